//! timerfd_create(2).

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::error::{BuildError, Stop};
use super::examined::{Examined, Saved};
use super::sys;
use crate::image::schema::{FdTypes, TimerfdEntry};
use crate::sys::SysError;

/// Saves clock, time left and interval.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved) -> Result<(), Stop> {
    let t = file
        .info
        .timer
        .ok_or_else(|| SysError::new("fdinfo", "clockid", nix::errno::Errno::ENODATA))?;
    saved.entry.r#type = FdTypes::Timerfd.into();
    saved.entry.tfd = Some(TimerfdEntry {
        id: saved.entry.id,
        flags: file.flags(),
        fown: file.fown()?,
        clockid: t.clock as u32,
        ticks: t.ticks,
        settime_flags: t.settime_flags,
        vsec: t.left.0,
        vnsec: t.left.1,
        isec: t.interval.0,
        insec: t.interval.1,
    });
    Ok(())
}

/// How a timer goes on after `away`.
#[derive(Debug, PartialEq, Eq)]
struct Resumed {
    /// Time to the next expiry; zero: disarmed.
    left: Duration,
    /// Expiries that passed meanwhile.
    missed: u64,
}

fn resume(left: Duration, interval: Duration, away: Duration) -> Resumed {
    if left.is_zero() || away < left {
        return Resumed {
            left: left.saturating_sub(away),
            missed: 0,
        };
    }
    let late = away - left;
    if interval.is_zero() {
        return Resumed {
            left: Duration::ZERO,
            missed: 1,
        };
    }
    let further = (late.as_nanos() / interval.as_nanos()) as u64;
    let into = Duration::from_nanos((late.as_nanos() % interval.as_nanos()) as u64);
    Resumed {
        left: interval - into,
        missed: 1 + further,
    }
}

/// Makes it again, `away` after it was saved at `saved_realtime`.
///
/// The caller lives outside the service's time namespace, so times are set as
/// time left. Absolute times of the wall clock stay absolute: setting the clock
/// moves their expiry.
pub(crate) fn restore(
    tfd: &TimerfdEntry,
    saved_realtime: Duration,
    away: Duration,
) -> Result<OwnedFd, BuildError> {
    let fd = sys::timerfd_create(tfd.clockid as i32)?;
    let left = duration(tfd.vsec, tfd.vnsec)?;
    let interval = duration(tfd.isec, tfd.insec)?;
    let wall = matches!(
        tfd.clockid as i32,
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM
    );
    let absolute = tfd.settime_flags as i32 & libc::TFD_TIMER_ABSTIME != 0;
    let mut ticks = tfd.ticks;
    if wall && absolute && !left.is_zero() {
        // The kernel counts expiries that have passed by itself.
        let flags = tfd.settime_flags as i32;
        sys::timerfd_settime(
            fd.as_fd(),
            flags,
            split(saved_realtime + left),
            split(interval),
        )?;
    } else {
        let next = resume(left, interval, away);
        ticks += next.missed;
        let over = next.left.is_zero() && next.missed > 0;
        // An expired one-shot timer is disarmed, and readable by its ticks.
        let arm = if over { Duration::ZERO } else { next.left };
        sys::timerfd_settime(fd.as_fd(), 0, split(arm), split(interval))?;
    }
    if ticks > 0 {
        sys::timerfd_set_ticks(fd.as_fd(), ticks)?;
    }
    Ok(fd)
}

fn duration(sec: u64, nsec: u64) -> Result<Duration, SysError> {
    let invalid = || {
        SysError::new(
            "timerfd_settime",
            "times in the image",
            nix::errno::Errno::EINVAL,
        )
    };
    if sec > i64::MAX as u64 / 4 || nsec >= 1_000_000_000 {
        return Err(invalid());
    }
    Ok(Duration::new(sec, nsec as u32))
}

fn split(d: Duration) -> (i64, i64) {
    (d.as_secs() as i64, d.subsec_nanos().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn time_away_counts() {
        let r = |left, missed| Resumed { left, missed };
        assert_eq!(resume(5 * S, Duration::ZERO, 2 * S), r(3 * S, 0));
        assert_eq!(resume(Duration::ZERO, S, 2 * S), r(Duration::ZERO, 0));
        assert_eq!(resume(S, Duration::ZERO, 9 * S), r(Duration::ZERO, 1));
        assert_eq!(resume(S, 10 * S, 25 * S), r(6 * S, 3));
        assert_eq!(resume(5 * S, 10 * S, 5 * S), r(10 * S, 1));
    }
}
