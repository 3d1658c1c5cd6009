//! Scheduling: policy, priority, affinity, I/O priority, timer slack, name.
//! All of it can be read and set from outside.

use std::io;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::ext::RcrThread;
use crate::image::schema::ThreadCoreEntry;
use crate::sys::process::{SchedAttr, ioprio_get, ioprio_set, sched_getattr, sched_setattr};
use crate::sys::text;

/// Reads a thread's scheduling state into its images.
pub fn save(pid: i32, tid: i32, core: &mut ThreadCoreEntry, ext: &mut RcrThread) -> io::Result<()> {
    let err = |e: crate::sys::SysError| io::Error::other(e.to_string());
    let attr = sched_getattr(tid).map_err(err)?;
    core.sched_nice = Some(attr.nice);
    core.sched_policy = Some(attr.policy);
    core.sched_prio = Some(attr.priority);
    ext.sched_flags = attr.flags;
    ext.sched_runtime = attr.runtime;
    ext.sched_deadline = attr.deadline;
    ext.sched_period = attr.period;
    ext.ioprio = ioprio_get(tid).map_err(err)?;
    let set = sched_getaffinity(Pid::from_raw(tid))?;
    ext.affinity = (0..CpuSet::count())
        .collect::<Vec<_>>()
        .chunks(8)
        .map(|c| {
            let bit = |(i, &cpu)| u8::from(set.is_set(cpu).unwrap_or(false)) << i;
            c.iter().enumerate().map(bit).fold(0, |a, b| a | b)
        })
        .collect();
    let comm = text::read(format!("/proc/{pid}/task/{tid}/comm"))?;
    core.comm = Some(
        String::from_utf8_lossy(&comm)
            .trim_end_matches('\n')
            .to_owned(),
    );
    let slack = text::read_string(format!("/proc/{tid}/timerslack_ns"))?;
    core.timerslack_ns = slack.trim().parse().ok();
    Ok(())
}

/// Sets a thread's scheduling state.
pub fn restore(tid: i32, core: &ThreadCoreEntry, ext: &RcrThread) -> io::Result<()> {
    let err = |e: crate::sys::SysError| io::Error::other(e.to_string());
    let wanted = SchedAttr {
        size: 0,
        policy: core.sched_policy.unwrap_or(0),
        flags: ext.sched_flags,
        nice: core.sched_nice.unwrap_or(0),
        priority: core.sched_prio.unwrap_or(0),
        runtime: ext.sched_runtime,
        deadline: ext.sched_deadline,
        period: ext.sched_period,
    };
    let now = sched_getattr(tid).map_err(err)?;
    if (SchedAttr { size: 0, ..now }) != wanted {
        // Some kernels report the slice of an ordinary task as its runtime
        // (6.12 and later); elsewhere it is not a thing to set.
        let ordinary = matches!(wanted.policy, 0 | 3 | 5);
        let plain = SchedAttr {
            runtime: 0,
            deadline: 0,
            period: 0,
            ..wanted
        };
        sched_setattr(tid, if ordinary { &plain } else { &wanted }).map_err(err)?;
    }
    if ioprio_get(tid).map_err(err)? != ext.ioprio {
        ioprio_set(tid, ext.ioprio).map_err(err)?;
    }
    let mut set = CpuSet::new();
    for (i, byte) in ext.affinity.iter().enumerate() {
        for bit in (0..8).filter(|b| byte >> b & 1 == 1) {
            set.set(i * 8 + bit)?;
        }
    }
    // Images of others do not tell.
    if !ext.affinity.is_empty() && set != sched_getaffinity(Pid::from_raw(tid))? {
        sched_setaffinity(Pid::from_raw(tid), &set)?;
    }
    if let Some(slack) = core.timerslack_ns {
        let path = format!("/proc/{tid}/timerslack_ns");
        if text::read_string(&path)?.trim() != slack.to_string() {
            std::fs::write(path, slack.to_string())?;
        }
    }
    Ok(())
}
