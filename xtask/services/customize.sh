#!/bin/sh
# Run by mmdebstrap on the root ($1) after the VM's own settings: everything
# that the services need beyond their packages. No service starts by itself.
set -eu
root=$1

for unit in redis-server nginx memcached valkey-server apache2 haproxy postgresql \
	mariadb mosquitto rabbitmq-server tomcat10 php8.4-fpm dovecot unbound \
	ssh prometheus podman podman-restart podman-clean-transient epmd; do
	chroot "$root" systemctl disable --quiet "$unit.service" || true
done
for unit in podman.socket podman-auto-update.timer phpsessionclean.timer \
	dovecot.socket epmd.socket ssh.socket netavark-dhcp-proxy.socket; do
	chroot "$root" systemctl disable --quiet "$unit" || true
done
chroot "$root" useradd --create-home --shell /bin/bash held
chroot "$root" sh -c 'echo held:held | chpasswd'
