//! Saving: what can be told of one ring.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;

use super::REQUESTS_MAX;
use super::record::*;
use crate::file::error::{Stop, refuse};
use crate::file::examined::{Examined, Saved};
use crate::file::sys;
use crate::image::schema::{ExtFileEntry, FdTypes};
use crate::sys::kernel::{Object, Window};
use crate::sys::{SysError, SysResult};

/// Flags of rings that are carried.
const CARRIED: u32 = IOPOLL
    | CQSIZE
    | CLAMP
    | R_DISABLED
    | SUBMIT_ALL
    | COOP_TASKRUN
    | TASKRUN_FLAG
    | SQE128
    | CQE32
    | SINGLE_ISSUER
    | DEFER_TASKRUN
    | NO_SQARRAY;
/// Slots of registered files or buffers: the kernel has a lower limit.
const SLOTS_MAX: u64 = 1 << 20;
const KIND: &str = "io_uring";
const ADVICE: &str = "turn io_uring off in the service's configuration, or untag the unit";

/// Rings found so far.
#[derive(Debug, Default)]
pub(crate) struct Rings {
    pub(super) found: BTreeMap<u32, Pointers>,
}

/// Addresses in the kernel that are to be found among those of other files.
#[derive(Debug, Default)]
pub(super) struct Pointers {
    /// Of the one task that may submit.
    pub submitter: Option<u64>,
    /// Of registered files, by slot.
    pub files: Vec<(u32, u64)>,
    /// Of the `struct eventfd_ctx`.
    pub eventfd: Option<u64>,
}

/// Saves a ring as far as it is known by itself.
pub(crate) fn save(
    file: &Examined<'_>,
    saved: &mut Saved,
    window: &mut Option<Window>,
    rings: &mut Rings,
) -> Result<(), Stop> {
    let looked = look(file, window);
    let (ring, pointers) = match looked {
        Err(Stop::Sys(e)) => {
            let reason = format!("the kernel does not tell what it holds ({e})");
            return refuse(KIND, reason, ADVICE);
        }
        looked => looked?,
    };
    saved.entry.r#type = FdTypes::Ext.into();
    saved.entry.ext = Some(ExtFileEntry {
        id: saved.entry.id,
        fown: file.fown()?,
    });
    if file.fown()?.pid != 0 {
        return refuse(KIND, "its signals go to a process", ADVICE);
    }
    saved.extra.uring = Some(Box::new(ring));
    rings.found.insert(saved.entry.id, pointers);
    Ok(())
}

fn look(file: &Examined<'_>, window: &mut Option<Window>) -> Result<(RcrUring, Pointers), Stop> {
    let window = match window {
        Some(w) => w,
        None => window.insert(Window::open()?),
    };
    let own = window.files(std::process::id() as i32)?;
    let fd = file.fd.as_raw_fd() as u32;
    let own = own.iter().find(|f| f.fd == fd);
    let lost = || SysError::new("BPF iterator", format!("fd {fd}"), nix::errno::Errno::EBADF);
    let ctx = window.object("io_ring_ctx", own.ok_or_else(lost)?.private);
    let [flags, sq_entries, cq_entries, sq_head, cq_tail] = ctx
        .numbers([
            "flags",
            "sq_entries",
            "cq_entries",
            "cached_sq_head",
            "cached_cq_tail",
        ])?
        .map(|n| n as u32);
    flags_are_carried(flags)?;
    let requests = in_flight(window, &ctx, sq_head, cq_tail)?;
    let reason = match requests {
        Some(0) => None,
        Some(n) => Some(format!("requests are in flight: {n}")),
        None => Some("it cannot be told whether requests are in flight".into()),
    };
    if let Some(reason) = reason {
        return refuse(KIND, reason, "wait for them, or untag the unit");
    }
    let overflow = ctx.number("cq_overflow_list")?;
    if overflow != ctx.address("cq_overflow_list")? {
        let reason = "completions wait for which it had no room";
        return refuse(KIND, reason, "try again");
    }
    registered_otherwise(file, window, &ctx)?;
    if flags & R_DISABLED == 0 {
        countable(flags, cq_entries, sq_head, cq_tail)?;
    }
    let (file_slots, files) = registered_files(window, &ctx)?;
    let mut pointers = Pointers {
        files,
        ..Pointers::default()
    };
    let [submitter, eventfd] = ctx.numbers(["submitter_task", "io_ev_fd"])?;
    pointers.submitter = (submitter != 0).then_some(submitter);
    let mut of_workers = false;
    if eventfd != 0 {
        let eventfd = window.object("io_ev_fd", eventfd);
        let [context, workers] = eventfd.numbers(["cq_ev_fd", "eventfd_async"])?;
        pointers.eventfd = Some(context);
        of_workers = workers & 1 != 0;
    }
    let mut ring = RcrUring {
        flags,
        sq_entries,
        cq_entries,
        file_slots,
        buffers: buffers(file),
        eventfd_of_workers: of_workers,
        ..RcrUring::default()
    };
    if file.policy.payload {
        memory(file, &mut ring, sq_head, cq_tail)?;
    }
    Ok((ring, pointers))
}

fn flags_are_carried(flags: u32) -> Result<(), Stop> {
    let reason = match flags {
        f if f & SQPOLL != 0 => "a thread of the kernel polls it (IORING_SETUP_SQPOLL)".into(),
        f if f & NO_MMAP != 0 => "it lies in memory of the program (IORING_SETUP_NO_MMAP)".into(),
        f if f & ATTACH_WQ != 0 => "it shares workers with another ring".into(),
        f if f & !CARRIED != 0 => format!("it was made with the flags {:#x}", f & !CARRIED),
        _ => return Ok(()),
    };
    refuse(KIND, reason, ADVICE)
}

/// How many requests are in flight; `None` where the kernel does not know.
fn in_flight(
    window: &Window,
    ctx: &Object<'_>,
    sq_head: u32,
    cq_tail: u32,
) -> SysResult<Option<usize>> {
    // Since Linux 6.16.
    if window.has("io_ring_ctx", "nr_req_allocated") {
        let [all, free] = ctx.numbers(["nr_req_allocated", "submit_state.free_list.next"])?;
        let free = window.list_length(free, all as usize + 1)?;
        return Ok(Some((all as usize).saturating_sub(free)));
    }
    // Before, as it found out itself where one request waits for all before.
    let [extra, unknown] = ctx.numbers(["cq_extra", "drain_disabled"])?;
    let left = sq_head.wrapping_add(extra as u32).wrapping_sub(cq_tail);
    Ok((unknown == 0 || left == 0).then_some(left as usize))
}

/// What may be registered and is not carried.
fn registered_otherwise(
    file: &Examined<'_>,
    window: &Window,
    ctx: &Object<'_>,
) -> Result<(), Stop> {
    const THINGS: &[(&str, &str)] = &[
        ("io_bl_xa.xa_head", "provided buffers"),
        ("personalities.xa_head", "credentials"),
        ("zcrx_ctxs.xa_head", "a receive queue of a network device"),
        ("ifq", "a receive queue of a network device"),
        ("param_region.nr_pages", "a memory region"),
        ("restrictions.registered", "restrictions"),
        ("restrictions.op_registered", "restrictions"),
        ("restrictions.reg_registered", "restrictions"),
        ("iowq_limits_set", "limits of workers"),
    ];
    for (path, what) in THINGS {
        if window.has("io_ring_ctx", path) && ctx.number(path)? != 0 {
            let reason = format!("{what} are registered with it");
            return refuse(KIND, reason, ADVICE);
        }
    }
    if file.info.other("NAPI").is_some_and(|n| n != "disabled") {
        return refuse(KIND, "it polls network devices", ADVICE);
    }
    // Since Linux 6.12.
    let clock = match window.has("io_ring_ctx", "clockid") {
        true => ctx.number("clockid")?,
        false => libc::CLOCK_MONOTONIC as u64,
    };
    if clock != libc::CLOCK_MONOTONIC as u64 {
        return refuse(KIND, "another clock is registered with it", ADVICE);
    }
    Ok(())
}

/// Whether the kernel's numbers can be reached again.
fn countable(flags: u32, cq_entries: u32, sq_head: u32, cq_tail: u32) -> Result<(), Stop> {
    let most = match flags & SINGLE_ISSUER {
        0 => REQUESTS_MAX,
        // They are made some at a time by the thread.
        _ => REQUESTS_MAX.min(cq_entries.saturating_mul(1 << 14)),
    };
    let so_far = sq_head.max(cq_tail);
    if so_far > most {
        let reason = format!("it has served {so_far} requests, more than {most}");
        return refuse(KIND, reason, "restart the service");
    }
    if cq_tail > sq_head && flags & (DEFER_TASKRUN | IOPOLL) != 0 {
        let reason = "it has had more completions than requests";
        return refuse(KIND, reason, "restart the service");
    }
    Ok(())
}

/// Slots for registered files, and the addresses of those that are filled.
fn registered_files(window: &Window, ctx: &Object<'_>) -> Result<(u32, Vec<(u32, u64)>), Stop> {
    const FLAGS: u64 = 7;
    let words = |at: u64, count: u64| -> SysResult<Vec<u64>> {
        let bytes = window.copy(&[(at, count as usize * 8)])?;
        let word = |b: &[u8]| u64::from_le_bytes(b.try_into().expect("8 bytes"));
        Ok(bytes[0].chunks_exact(8).map(word).collect())
    };
    let too_many = |count: u64| match count > SLOTS_MAX {
        true => refuse(
            KIND,
            format!("{count} files are registered with it"),
            ADVICE,
        ),
        false => Ok(()),
    };
    // Since Linux 6.13.
    if !window.has("io_ring_ctx", "file_table.data.nodes") {
        let [count, at] = ctx.numbers(["nr_user_files", "file_table.files"])?;
        too_many(count)?;
        let files = words(at, count)?.into_iter().map(|f| f & !FLAGS);
        let filled = (0..).zip(files).filter(|(_, f)| *f != 0).collect();
        return Ok((count as u32, filled));
    }
    let [count, at] = ctx.numbers(["file_table.data.nr", "file_table.data.nodes"])?;
    too_many(count)?;
    let mut filled = Vec::new();
    for (slot, node) in (0..).zip(words(at, count)?) {
        if node == 0 {
            continue;
        }
        let node = window.object("io_rsrc_node", node);
        let [file, tag] = node.numbers(["file_ptr", "tag"])?;
        if tag != 0 {
            return refuse(KIND, "a file is registered with a tag", ADVICE);
        }
        filled.push((slot, file & !FLAGS));
    }
    Ok((count as u32, filled))
}

/// Registered buffers as fdinfo lists them: `    0: 0x7f…/4096`.
fn buffers(file: &Examined<'_>) -> Vec<RcrRingBuffer> {
    let lines = file.info.others.iter();
    let after = lines.skip_while(|(key, _)| key != "UserBufs").skip(1);
    let mut out = Vec::new();
    for (key, value) in after {
        if key.trim().parse::<u32>().is_err() {
            break;
        }
        let parts = value.split_once('/').and_then(|(start, len)| {
            let start = u64::from_str_radix(start.strip_prefix("0x")?, 16).ok()?;
            Some((start, len.parse().ok()?))
        });
        let (start, len) = parts.unwrap_or((0, 0));
        out.push(RcrRingBuffer { start, len });
    }
    out
}

/// The ring's memory, and where in it everything is.
fn memory(
    file: &Examined<'_>,
    ring: &mut RcrUring,
    sq_head: u32,
    cq_tail: u32,
) -> Result<(), Stop> {
    // One like it tells where everything is.
    let mut p = parameters(ring.flags, ring.cq_entries);
    sys::ring_setup(ring.sq_entries, &mut p)?;
    ring.offsets = p.offsets().to_vec();
    let same = (p.sq_entries(), p.cq_entries()) == (ring.sq_entries, ring.cq_entries);
    let layout = Layout::new(ring.flags, ring.sq_entries, ring.cq_entries, &ring.offsets);
    let Some(layout) = layout.filter(|_| same) else {
        return refuse(KIND, "this kernel makes others", ADVICE);
    };
    let (shared, sqes) = layout.map(file.fd)?;
    (ring.ring, ring.sqes) = (shared.read(), sqes.read());
    let seen = [layout.sq_head, layout.cq_tail].map(|at| Layout::word(&ring.ring, at));
    if seen != [Some(sq_head), Some(cq_tail)] {
        return refuse(KIND, "it is being changed", "try again");
    }
    Ok(())
}
