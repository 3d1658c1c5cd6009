//! What `/proc` shows of a tree, before and after: whatever the program is
//! about, none of this may change.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rcr_engine::{Process, Tree};

use super::Findings;

/// Lines of `status` that describe state, not circumstances.
const STATUS: &[&str] = &[
    "Name",
    "Umask",
    "Tgid",
    "Pid",
    "PPid",
    "Uid",
    "Gid",
    "Groups",
    "NStgid",
    "NSpgid",
    "NSsid",
    "VmLck",
    "VmData",
    "VmStk",
    "VmExe",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "Speculation_Store_Bypass",
    "SpeculationIndirectBranch",
    "Cpus_allowed",
    "Mems_allowed",
    "THP_enabled",
];

/// Fields of `stat` (proc_pid_stat(5)): groups, terminal, priorities, exit
/// signal, policy, and where the parts of the program lie.
const STAT: &[usize] = &[
    5, 6, 7, 8, 18, 19, 26, 27, 28, 38, 40, 41, 45, 46, 47, 48, 49, 50, 51,
];

/// Files of a process that are compared as they are.
const WHOLE: &[&str] = &[
    "auxv",
    "cmdline",
    "environ",
    "limits",
    "oom_score_adj",
    "coredump_filter",
    "personality",
    "uid_map",
    "gid_map",
    "setgroups",
    "timers",
    "timerslack_ns",
];

const LINKS: &[&str] = &["exe", "cwd", "root"];
const NAMESPACES: &[&str] = &["mnt", "uts", "user", "pid", "net", "ipc", "cgroup"];

/// Which parts of the picture a forged kernel changes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Leave {
    /// The kernel's own mappings.
    pub kernel_mappings: bool,
}

/// Everything of a tree: what it is → how it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Picture {
    facts: BTreeMap<String, String>,
    /// The processes.
    pub pids: Vec<i32>,
    /// Some thread runs, or wants to.
    pub awake: bool,
}

impl Picture {
    /// Looks at a tree whose processes wait.
    pub fn take(tree: &Tree, leave: Leave) -> Result<Self> {
        let mut picture = Self::default();
        for p in tree.scan().context("process table")? {
            picture.pids.push(p.pid);
            picture
                .process(&p, leave)
                .with_context(|| format!("looking at process {}", p.pid))?;
        }
        Ok(picture)
    }

    fn add(&mut self, what: String, how: impl Into<String>) {
        self.facts.insert(what, how.into());
    }

    fn process(&mut self, p: &Process, leave: Leave) -> Result<()> {
        let pid = p.pid;
        let dir = format!("/proc/{}", p.voice());
        let name = |what: &str| format!("process {pid} {what}");
        if p.is_zombie() {
            let state = format!("zombie of {} with status {}", p.ppid, p.exit_code);
            self.add(name("state"), state);
            return Ok(());
        }
        self.add(name("threads"), format!("{:?}", p.tids));
        let stopped = p.state == 'T' || p.state == 't';
        self.add(name("stopped"), stopped.to_string());
        let stat = rcr_engine::Process::read(pid)?.context("gone")?;
        self.add(name("group"), format!("{} {}", stat.pgid, stat.sid));
        self.stat(pid)?;
        for file in WHOLE {
            let bytes = fs::read(format!("{dir}/{file}")).with_context(|| (*file).to_owned())?;
            self.add(name(file), String::from_utf8_lossy(&bytes));
        }
        let cgroup = fs::read_to_string(format!("{dir}/cgroup"))?;
        let unified = cgroup.lines().find(|l| l.starts_with("0::"));
        self.add(name("cgroup"), unified.unwrap_or_default());
        for link in LINKS {
            let target = fs::read_link(format!("{dir}/{link}"))?;
            self.add(name(link), without_number(&target.to_string_lossy()));
        }
        for ns in NAMESPACES {
            let own = fs::read_link(format!("/proc/self/ns/{ns}"))?;
            let theirs = fs::read_link(format!("{dir}/ns/{ns}"))?;
            self.add(
                name(&format!("shares our {ns} namespace")),
                (own == theirs).to_string(),
            );
        }
        self.add(name("mounts"), mounts(&dir)?);
        self.mappings(&dir, pid, leave)?;
        self.files(&dir, pid)?;
        for tid in &p.tids {
            self.thread(pid, *tid)?;
        }
        Ok(())
    }

    fn stat(&mut self, pid: i32) -> Result<()> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, rest) = text.rsplit_once(')').context("stat")?;
        let words: Vec<&str> = rest.split_ascii_whitespace().collect();
        for n in STAT {
            let value = words.get(n - 3).copied().unwrap_or_default();
            self.add(format!("process {pid} stat field {n}"), value);
        }
        Ok(())
    }

    fn thread(&mut self, pid: i32, tid: i32) -> Result<()> {
        let dir = format!("/proc/{pid}/task/{tid}");
        let status = fs::read_to_string(format!("{dir}/status"))?;
        let busy = |l: &str| l.starts_with("State:\tR") || l.starts_with("State:\tD");
        self.awake |= status.lines().any(busy);
        for line in status.lines() {
            let Some((key, value)) = line.split_once(':') else {
                continue;
            };
            if STATUS.contains(&key) {
                self.add(format!("thread {tid} {key}"), value.trim());
            }
        }
        let comm = fs::read_to_string(format!("{dir}/comm"))?;
        self.add(format!("thread {tid} comm"), comm);
        Ok(())
    }

    /// Every mapping with its `VmFlags`, as the list it is.
    fn mappings(&mut self, dir: &str, pid: i32, leave: Leave) -> Result<()> {
        let smaps = String::from_utf8_lossy(&fs::read(format!("{dir}/smaps"))?).into_owned();
        let mut list = Vec::new();
        let mut current = String::new();
        for line in smaps.lines() {
            if let Some(flags) = line.strip_prefix("VmFlags:") {
                list.push(format!("{current} [{}]", vm_flags(flags, &current)));
            } else if !line
                .split_ascii_whitespace()
                .next()
                .is_some_and(|w| w.ends_with(':'))
            {
                current = mapping(line);
            }
        }
        if leave.kernel_mappings {
            // What an old vDSO turned into is nameless memory with code.
            let kernels = |l: &str| {
                l.contains("[vdso]") || l.contains("[vvar") || l.contains(" r-xp 00000000 00:00 0 ")
            };
            list.retain(|l| !kernels(l));
        }
        self.add(format!("process {pid} mappings"), merged(list).join("\n"));
        Ok(())
    }

    fn files(&mut self, dir: &str, pid: i32) -> Result<()> {
        for entry in fs::read_dir(format!("{dir}/fd"))? {
            let fd = entry?.file_name().to_string_lossy().into_owned();
            let target = fs::read_link(format!("{dir}/fd/{fd}"))?;
            let target = without_number(&target.to_string_lossy());
            self.add(format!("process {pid} fd {fd}"), target);
            let info = fs::read_to_string(format!("{dir}/fdinfo/{fd}"))?;
            self.add(format!("process {pid} fdinfo {fd}"), fdinfo(&info));
        }
        Ok(())
    }

    /// Notes what differs in a later picture.
    pub fn compare(&self, later: &Picture, f: &mut Findings) {
        for (what, was) in &self.facts {
            match later.facts.get(what) {
                Some(is) if is == was => {}
                Some(is) => difference(f, what, was, is),
                None => f.note(format!("{what}: was {was:?}, is gone")),
            }
        }
        for (what, is) in &later.facts {
            if !self.facts.contains_key(what) {
                f.note(format!("{what}: is new: {is:?}"));
            }
        }
    }
}

/// Values of several lines: only the lines that differ.
fn difference(f: &mut Findings, what: &str, was: &str, is: &str) {
    let only = |a: &str, b: &str| -> Vec<String> {
        let mut others: Vec<&str> = b.lines().collect();
        let mut rest = Vec::new();
        for line in a.lines() {
            match others.iter().position(|o| *o == line) {
                Some(at) => drop(others.remove(at)),
                None => rest.push(line.to_owned()),
            }
        }
        rest
    };
    f.note(format!(
        "{what}: was {:?}, is {:?}",
        only(was, is),
        only(is, was)
    ));
}

/// A line of `maps` without inode numbers of nameless files.
fn mapping(line: &str) -> String {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let name = words.get(5..).unwrap_or_default().join(" ");
    let nameless = name.ends_with("(deleted)")
        || name.starts_with("[anon_shmem")
        || name.starts_with("anon_inode:");
    let shown = if nameless { 3 } else { 5 };
    let shown = words[..shown.min(words.len())].join(" ");
    format!("{shown} {}", without_number(&name))
}

/// Neighbours that differ in nothing count as one: whether the kernel joins
/// them depends on their past.
fn merged(list: Vec<String>) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for line in list {
        let parts = |l: &str| {
            let (range, rest) = l.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            Some((start.to_owned(), end.to_owned(), rest.to_owned()))
        };
        let joined = out.last().and_then(|last| {
            let (start, middle, rest) = parts(last)?;
            let (from, end, same) = parts(&line)?;
            let anonymous = rest.contains(" 00000000 00:00 0 ");
            (anonymous && middle == from && rest == same).then(|| format!("{start}-{end} {rest}"))
        });
        match joined {
            Some(joined) => *out.last_mut().expect("just looked at") = joined,
            None => out.push(line),
        }
    }
    out
}

/// `VmFlags` without what is circumstance.
fn vm_flags(flags: &str, mapping: &str) -> String {
    let words: Vec<&str> = flags.split_ascii_whitespace().collect();
    // Read-only anonymous memory is charged ("ac") once it was writable.
    let anonymous = !mapping.contains('/') && !words.contains(&"wr");
    // "sd" tells that a page was written to since somebody asked.
    let shown = |w: &&&str| **w != "sd" && !(anonymous && **w == "ac");
    let words: Vec<&str> = words.iter().filter(shown).copied().collect();
    words.join(" ")
}

/// `pipe:[123]` and `/a (deleted)` without what the kernel numbers.
fn without_number(target: &str) -> String {
    // A file that lost its name gets no name back.
    if let Some((dir, _)) = target.rsplit_once('/')
        && target.ends_with(" (deleted)")
    {
        return format!("{dir}/ (deleted)");
    }
    match target.split_once(":[") {
        Some((kind, _)) if !kind.contains('/') && kind != "anon_inode" => kind.to_owned(),
        _ => target.to_owned(),
    }
}

/// `fdinfo` without numbers of inodes, mounts, and without running times.
fn fdinfo(text: &str) -> String {
    let mut lines: Vec<String> = text
        .lines()
        .filter_map(|l| {
            let (key, value) = l.split_once(':')?;
            let words: Vec<&str> = value.split_ascii_whitespace().collect();
            match key {
                "mnt_id" | "ino" | "map_id" | "it_value" | "eventfd-id" | "scm_fds" => None,
                "tfd" => Some(interest(&words)),
                // What is registered with an io_uring.
                _ if key.trim().parse::<u32>().is_ok() => {
                    Some(format!("{key} {}", without_number(value.trim())))
                }
                _ if key.starts_with("inotify") || key.starts_with("fanotify") => {
                    // A file without a name gets another inode, a mount another number.
                    let numbered = key.ends_with(" ino") || key.ends_with(" mnt_id");
                    let shown = |w: &&&str| !w.starts_with("ino:") && !w.starts_with("f_handle:");
                    let words = words[usize::from(numbered)..].iter().filter(shown);
                    let words: Vec<&str> = words.copied().collect();
                    Some(format!("{key} {}", words.join(" ")))
                }
                "flags" => Some(format!("flags {}", status_flags(words.first()?))),
                "lock" => Some(format!("lock {}", words.get(1..4)?.join(" "))),
                _ => Some(format!("{key} {}", words.join(" "))),
            }
        })
        .collect();
    lines.sort();
    lines.join("\n")
}

/// A line of an interest list. Errors and hang-ups are always reported, except
/// that a used-up one-shot entry shows nothing.
fn interest(words: &[&str]) -> String {
    let (Some(fd), Some(events), Some(data)) = (words.first(), words.get(2), words.get(4)) else {
        return words.join(" ");
    };
    let always = (libc::EPOLLERR | libc::EPOLLHUP) as u32;
    let events = u32::from_str_radix(events, 16).unwrap_or(0) & !always;
    format!("tfd {fd} events {events:x} data {data}")
}

/// Status flags; that a file was made without a name is no state of it.
fn status_flags(octal: &str) -> String {
    let flags = i32::from_str_radix(octal, 8).unwrap_or(0);
    let nameless = flags & libc::O_TMPFILE == libc::O_TMPFILE;
    let shown = if nameless {
        flags & !libc::O_TMPFILE
    } else {
        flags
    };
    // What a path leads to is settled once it is opened.
    let path = shown & libc::O_PATH != 0;
    let shown = if path {
        shown & !libc::O_NOFOLLOW
    } else {
        shown
    };
    // Large files are the only ones there are.
    format!("{:o}", shown & !0o100_000)
}

/// `mountinfo` without ids and device numbers, in the order of places.
fn mounts(dir: &str) -> Result<String> {
    let text = fs::read_to_string(Path::new(dir).join("mountinfo"))?;
    let mut lines: Vec<String> = text
        .lines()
        .map(|l| {
            let (left, right) = l.split_once(" - ").unwrap_or((l, ""));
            let words: Vec<&str> = left.split(' ').collect();
            let groups = words[6..].iter().map(|w| w.split(':').next().unwrap_or(w));
            let groups = groups.collect::<Vec<_>>().join(" ");
            format!("{} {groups} - {right}", words[3..6].join(" "))
        })
        .collect();
    lines.sort();
    Ok(lines.join("\n"))
}
