#!/bin/sh
# Run by mmdebstrap on the finished root ($1): the second kernel and the VM's
# own settings. BACKPORTS names the suite the newer kernel comes from.
set -eu
root=$1

chroot "$root" apt-get install -y -q -t "$BACKPORTS" linux-image-amd64

printf 'bind * -::*\nprotected-mode no\n' >>"$root/etc/redis/redis.conf"
echo 5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e >"$root/etc/machine-id"
chroot "$root" passwd -d root

for unit in systemd-networkd.service rcr-agent@0.service rcr-agent@1.service; do
	chroot "$root" systemctl enable "$unit"
done
# Periodic jobs and consoles nobody sits at: they only cost emulated time.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
	e2scrub_all.timer e2scrub_reap.service fstrim.timer \
	getty@tty1.service serial-getty@ttyS0.service \
	systemd-networkd-wait-online.service systemd-pcrphase.service \
	systemd-hwdb-update.service ldconfig.service \
	systemd-journal-catalog-update.service; do
	ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
