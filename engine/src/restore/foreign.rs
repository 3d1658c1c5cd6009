//! Dumps that CRIU made: what our own images would say, from the common ones.

use crate::clock::Clocks;
use crate::ext::{self, RcrInventory, RcrTask, RcrThread};
use crate::image::schema::{
    CoreEntry, SeccompEntry, SeccompMode, TaskCoreEntry, TimensEntry, Timespec,
};
use crate::image::{ImageError, ImageSource, Kind, get_records, names};

use super::RestoreError;

/// `task_state` of the common schema: has ended and waits to be reaped.
const DEAD: u32 = 2;
/// See [`DEAD`]; what older dumps of ours say.
const ZOMBIE: u32 = 6;
/// See [`DEAD`].
const STOPPED: u32 = 3;

/// Whether the dump has images of ours.
pub fn is_foreign(source: &dyn ImageSource) -> Result<bool, RestoreError> {
    let own = source
        .get(ext::INVENTORY)
        .map_err(|source| ImageError::Io {
            name: ext::INVENTORY.into(),
            source,
        })?;
    Ok(own.is_none())
}

/// The clocks go on from where they were at the dump; nothing tells how long
/// ago that was.
pub fn inventory(source: &dyn ImageSource) -> Result<RcrInventory, RestoreError> {
    let clocks: Vec<TimensEntry> = get_records(source, Kind::Timens, names::TIMENS)?;
    let ns = |t: &Timespec| {
        let sum = t
            .tv_sec
            .checked_mul(1_000_000_000)?
            .checked_add(t.tv_nsec)?;
        i64::try_from(sum).ok()
    };
    let far = || ImageError::Content {
        name: names::TIMENS.into(),
        what: "a clock is out of range".into(),
    };
    let mut own = RcrInventory {
        version: ext::VERSION,
        realtime_ns: Clocks::now().realtime,
        ..RcrInventory::default()
    };
    match clocks.first() {
        Some(c) => {
            own.monotonic_ns = ns(&c.monotonic).ok_or_else(far)?;
            own.boottime_ns = ns(&c.boottime).ok_or_else(far)?;
        }
        // As if they had been in the host's time namespace.
        None => {
            own.boot_id = crate::dump::boot_id().map_err(RestoreError::io("boot_id"))?;
        }
    }
    Ok(own)
}

/// What is known of a process.
pub fn task(tc: &TaskCoreEntry) -> RcrTask {
    let zombie = matches!(tc.task_state, DEAD | ZOMBIE);
    let stopped_by = tc.stop_signo.unwrap_or(libc::SIGSTOP as u32) as i32;
    RcrTask {
        zombie,
        exit_status: if zombie { tc.exit_code as i32 } else { 0 },
        stop_signal: if tc.task_state == STOPPED {
            stopped_by
        } else {
            0
        },
        ..RcrTask::default()
    }
}

/// What is known of a thread.
pub fn thread(
    tid: i32,
    core: &CoreEntry,
    filters: &SeccompEntry,
) -> Result<RcrThread, RestoreError> {
    let lacks = |what: &str| {
        RestoreError::from(ImageError::Content {
            name: names::core(tid),
            what: what.to_owned(),
        })
    };
    let info = core.thread_info.as_ref();
    let fp = &info.ok_or_else(|| lacks("has no registers"))?.fpregs;
    let xstate = crate::arch::xstate::from_entry(fp)
        .ok_or_else(|| lacks("uses processor features that are not here or not known"))?;
    let mut chain = Vec::new();
    if let Some(t) = &core.thread_core
        && t.seccomp_mode == Some(SeccompMode::Filter as i32)
    {
        let mut next = Some(t.seccomp_filter.unwrap_or(0));
        while let Some(index) = next {
            if chain.len() > filters.seccomp_filters.len() {
                return Err(lacks("names filters that stand on each other in a circle"));
            }
            chain.push(index);
            let filter = filters.seccomp_filters.get(index as usize);
            next = filter
                .ok_or_else(|| lacks("names a filter that is not there"))?
                .prev;
        }
        chain.reverse();
    }
    Ok(RcrThread {
        xstate,
        seccomp_chain: chain,
        ..RcrThread::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::schema::{SeccompFilter, ThreadCoreEntry, ThreadInfoX86};

    fn filtered(filter: u32) -> CoreEntry {
        CoreEntry {
            thread_info: Some(ThreadInfoX86::default()),
            thread_core: Some(ThreadCoreEntry {
                seccomp_mode: Some(SeccompMode::Filter as i32),
                seccomp_filter: Some(filter),
                ..ThreadCoreEntry::default()
            }),
            ..CoreEntry::default()
        }
    }

    fn on(prev: Option<u32>) -> SeccompFilter {
        SeccompFilter {
            prev,
            ..SeccompFilter::default()
        }
    }

    struct OneImage(Vec<u8>);

    impl ImageSource for OneImage {
        fn get(&self, name: &str) -> std::io::Result<Option<&[u8]>> {
            Ok((name == names::TIMENS).then_some(&self.0))
        }

        fn names(&self) -> Vec<String> {
            vec![names::TIMENS.into()]
        }
    }

    #[test]
    fn a_clock_out_of_range_is_an_error() {
        for (tv_sec, good) in [
            (77, true),
            (u64::MAX, false),
            (u64::MAX / 1_000_000_000, false),
        ] {
            let clock = Timespec {
                tv_sec,
                tv_nsec: 999_999_999,
            };
            let entry = TimensEntry {
                monotonic: clock,
                boottime: clock,
            };
            let image = crate::image::write_image(Kind::Timens, &[entry]);
            assert_eq!(inventory(&OneImage(image)).is_ok(), good, "{tv_sec}");
        }
    }

    #[test]
    fn a_chain_of_filters_is_oldest_first() {
        let filters = SeccompEntry {
            seccomp_filters: vec![on(None), on(Some(0)), on(Some(1))],
        };
        let t = thread(7, &filtered(2), &filters).unwrap();
        assert_eq!(t.seccomp_chain, [0, 1, 2]);
        assert!(thread(7, &filtered(3), &filters).is_err());
        let circle = SeccompEntry {
            seccomp_filters: vec![on(Some(1)), on(Some(0))],
        };
        assert!(thread(7, &filtered(0), &circle).is_err());
    }

    #[test]
    fn states() {
        let tc = |task_state| TaskCoreEntry {
            task_state,
            exit_code: 0x300,
            ..TaskCoreEntry::default()
        };
        assert!(task(&tc(DEAD)).zombie && task(&tc(ZOMBIE)).exit_status == 0x300);
        assert_eq!(task(&tc(STOPPED)).stop_signal, libc::SIGSTOP);
        assert_eq!(task(&tc(1)), RcrTask::default());
    }
}
