//! Clocks that never go back: a time namespace that continues the old ones
//! (time_namespaces(7)).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::unistd::Pid;

use crate::ext::{RcrInventory, RcrTime};
use crate::namespace::{NsIds, NsKind};
use crate::sys::SysResult;
use crate::sys::process::{clock_ns, unshare_time};
use crate::sys::text;
use crate::sys::timens;

const SECOND: i64 = 1_000_000_000;

/// The three clocks at one moment, nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clocks {
    /// CLOCK_REALTIME.
    pub realtime: i64,
    /// CLOCK_MONOTONIC.
    pub monotonic: i64,
    /// CLOCK_BOOTTIME.
    pub boottime: i64,
}

impl Clocks {
    /// The clocks as this process sees them.
    pub fn now() -> Self {
        Self {
            realtime: clock_ns(libc::CLOCK_REALTIME),
            monotonic: clock_ns(libc::CLOCK_MONOTONIC),
            boottime: clock_ns(libc::CLOCK_BOOTTIME),
        }
    }
}

/// What a time namespace adds to the monotonic and boot clocks, nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offsets {
    /// For CLOCK_MONOTONIC.
    pub monotonic: i64,
    /// For CLOCK_BOOTTIME.
    pub boottime: i64,
}

impl Offsets {
    /// The offsets of the namespace a process lives in.
    pub fn of(pid: i32) -> io::Result<Self> {
        let ids = NsIds::of(Pid::from_raw(pid)).map_err(io::Error::other)?;
        if ids.get(NsKind::Time) == ids.get(NsKind::TimeForChildren) {
            return Self::for_children_of(pid);
        }
        let ns = std::fs::File::open(format!("/proc/{pid}/ns/time"))?;
        let text = timens::read_offsets(ns.as_fd())?;
        Self::parse(&text).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "timens_offsets is not understood",
            )
        })
    }

    /// The offsets of the namespace that future children of a process live in.
    pub fn for_children_of(pid: i32) -> io::Result<Self> {
        match text::read_string(format!("/proc/{pid}/timens_offsets")) {
            Ok(text) => Self::parse(&text).ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    "timens_offsets is not understood",
                )
            }),
            // A kernel without time namespaces.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(e),
        }
    }

    /// How these differ from `base`.
    pub fn relative_to(self, base: Self) -> RcrTime {
        RcrTime {
            monotonic_ns: self.monotonic.saturating_sub(base.monotonic),
            boottime_ns: self.boottime.saturating_sub(base.boottime),
        }
    }

    /// The offsets that differ from these by `by`.
    pub fn shifted(self, by: &RcrTime) -> Self {
        Self {
            monotonic: self.monotonic.saturating_add(by.monotonic_ns),
            boottime: self.boottime.saturating_add(by.boottime_ns),
        }
    }

    /// A new time namespace with these offsets.
    pub fn namespace(self) -> io::Result<OwnedFd> {
        timens::make(&self.to_text())
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut out = Self::default();
        for line in text.lines() {
            let mut words = line.split_ascii_whitespace();
            let (clock, sec, ns) = (words.next()?, words.next()?, words.next()?);
            let value = sec.parse::<i64>().ok()?.checked_mul(SECOND)?;
            let value = value.checked_add(ns.parse::<i64>().ok()?)?;
            match clock {
                "monotonic" => out.monotonic = value,
                "boottime" => out.boottime = value,
                _ => return None,
            }
        }
        Some(out)
    }

    /// The text that `timens_offsets` takes.
    pub fn to_text(self) -> String {
        let line =
            |name, v: i64| format!("{name} {} {}\n", v.div_euclid(SECOND), v.rem_euclid(SECOND));
        line("monotonic", self.monotonic) + &line("boottime", self.boottime)
    }
}

/// The offsets with which the saved clocks go on, `now` being the clocks of the
/// kernel (not of a namespace): they advanced since the dump as CLOCK_REALTIME
/// did. A wall clock that was set back meanwhile counts as no time passed.
pub fn continued(saved: &RcrInventory, now: Clocks) -> Offsets {
    let passed = now.realtime.saturating_sub(saved.realtime_ns).max(0);
    let on = |then: i64, now: i64| then.saturating_add(passed).saturating_sub(now);
    Offsets {
        monotonic: on(saved.monotonic_ns, now.monotonic),
        boottime: on(saved.boottime_ns, now.boottime),
    }
}

/// Which offsets the restored processes need: those they had while the same
/// kernel runs on, else those that continue their clocks.
pub fn wanted(saved: &RcrInventory, boot_id: &str, now: Clocks) -> Offsets {
    if saved.boot_id == boot_id {
        return Offsets {
            monotonic: saved.monotonic_offset_ns,
            boottime: saved.boottime_offset_ns,
        };
    }
    continued(saved, now)
}

/// Puts all children that the calling process makes from now on into a new
/// time namespace with these offsets. It must have none of its own offsets.
pub fn enter_for_children(offsets: Offsets) -> io::Result<()> {
    let sys = |r: SysResult<()>| r.map_err(|e| io::Error::from(e.errno));
    sys(unshare_time())?;
    std::fs::write("/proc/self/timens_offsets", offsets.to_text())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn saved(realtime_ns: i64, monotonic_ns: i64) -> RcrInventory {
        RcrInventory {
            realtime_ns,
            monotonic_ns,
            boottime_ns: monotonic_ns,
            ..Default::default()
        }
    }

    #[test]
    fn clocks_of_damaged_images_and_texts_do_not_overflow() {
        let now = Clocks {
            realtime: i64::MAX,
            monotonic: i64::MIN,
            boottime: 1,
        };
        let o = continued(&saved(i64::MIN, i64::MAX), now);
        assert_eq!(o.monotonic, i64::MAX);
        assert_eq!(Offsets::parse("monotonic 9223372036 999999999"), None);
        let by = RcrTime {
            monotonic_ns: i64::MAX,
            ..RcrTime::default()
        };
        assert_eq!(o.shifted(&by).monotonic, i64::MAX);
    }

    proptest! {
        #[test]
        fn clocks_never_go_back(
            realtime in 0i64..1 << 60, mono in 0i64..1 << 50,
            passed in -(1i64 << 50)..1 << 50, fresh in 0i64..1 << 50,
        ) {
            let s = saved(realtime, mono);
            let now = Clocks { realtime: realtime + passed, monotonic: fresh, boottime: fresh };
            let o = continued(&s, now);
            prop_assert_eq!(now.monotonic + o.monotonic, mono + passed.max(0));
        }

        #[test]
        fn text_goes_both_ways(m in -(1i64 << 60)..1 << 60, b in -(1i64 << 60)..1 << 60) {
            let o = Offsets { monotonic: m, boottime: b };
            prop_assert_eq!(Offsets::parse(&o.to_text()), Some(o));
        }
    }
}
