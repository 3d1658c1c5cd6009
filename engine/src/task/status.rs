//! `/proc/TID/status`: credentials and seccomp mode (proc_pid_status(5)).

use std::io;

use crate::image::schema::CredsEntry;
use crate::sys::text;

/// The lines of one status file.
#[derive(Debug, Clone)]
pub struct Status(String);

impl Status {
    /// Reads the file of a task.
    pub fn read(tid: i32) -> io::Result<Self> {
        Self::read_thread(tid, tid)
    }

    /// Reads the file of a thread of a process.
    pub fn read_thread(pid: i32, tid: i32) -> io::Result<Self> {
        let text = text::read(format!("/proc/{pid}/task/{tid}/status"))?;
        Ok(Self::parse(&text))
    }

    pub(crate) fn parse(text: &[u8]) -> Self {
        Self(String::from_utf8_lossy(text).into_owned())
    }

    /// A line's value; empty where the kernel has no such line.
    pub fn get(&self, key: &str) -> &str {
        let mut values = self.0.lines().filter_map(|l| l.strip_prefix(key));
        let value = values.find_map(|rest| rest.strip_prefix(':'));
        value.map_or("", str::trim)
    }

    fn ids(&self, key: &str) -> Vec<u32> {
        self.get(key)
            .split_ascii_whitespace()
            .filter_map(|w| w.parse().ok())
            .collect()
    }

    fn caps(&self, key: &str) -> Vec<u32> {
        let v = u64::from_str_radix(self.get(key), 16).unwrap_or(0);
        vec![v as u32, (v >> 32) as u32]
    }

    /// Seccomp mode: 0 none, 1 strict, 2 filter.
    pub fn seccomp_mode(&self) -> i32 {
        self.get("Seccomp").parse().unwrap_or(0)
    }

    /// Memory that is locked into RAM, KiB.
    pub fn locked_kib(&self) -> u64 {
        let text = self.get("VmLck").trim_end_matches(" kB");
        text.trim().parse().unwrap_or(0)
    }

    /// File mode creation mask.
    pub fn umask(&self) -> u32 {
        u32::from_str_radix(self.get("Umask"), 8).unwrap_or(0o022)
    }

    /// Credentials, with ids as our user namespace sees them; `secbits` comes
    /// from the task itself.
    pub fn creds(&self, secbits: u32) -> io::Result<CredsEntry> {
        let bad = |k: &str| io::Error::new(io::ErrorKind::InvalidData, format!("status: {k}"));
        let [uid, euid, suid, fsuid] = self.ids("Uid").try_into().map_err(|_| bad("Uid"))?;
        let [gid, egid, sgid, fsgid] = self.ids("Gid").try_into().map_err(|_| bad("Gid"))?;
        Ok(CredsEntry {
            uid,
            gid,
            euid,
            egid,
            suid,
            sgid,
            fsuid,
            fsgid,
            cap_inh: self.caps("CapInh"),
            cap_prm: self.caps("CapPrm"),
            cap_eff: self.caps("CapEff"),
            cap_bnd: self.caps("CapBnd"),
            cap_amb: self.caps("CapAmb"),
            secbits,
            groups: self.ids("Groups"),
            no_new_privs: self.get("NoNewPrivs").parse().ok(),
            ..CredsEntry::default()
        })
    }
}
