//! Seccomp: mode and filters (seccomp(2)).

use crate::image::schema::{SeccompEntry, SeccompFilter};
use crate::remote::Program;
use crate::sys::SysResult;
use crate::sys::ptrace;

const SET_MODE_STRICT: u64 = 0;
const SET_MODE_FILTER: u64 = 1;
const FILTER_FLAG_TSYNC: u64 = 1;
/// `LOG`, `SPEC_ALLOW`, `WAIT_KILLABLE_RECV`: what a filter keeps for itself.
const KEPT_FLAGS: u64 = 1 << 1 | 1 << 2 | 1 << 5;

/// All filters of a dump; threads name chains of them.
#[derive(Debug, Default)]
pub struct FilterTable {
    filters: Vec<SeccompFilter>,
    chains: Vec<Vec<u32>>,
}

impl FilterTable {
    /// Records the filters of a thread: the indexes of its chain, oldest first.
    pub fn save(&mut self, tid: i32) -> SysResult<Vec<u32>> {
        let mut chain = Vec::new();
        while let Some((insns, flags)) = ptrace::seccomp_filter(tid, chain.len())? {
            let bytes: Vec<u8> = insns
                .iter()
                .flat_map(|i| {
                    let [a, b] = i.code.to_le_bytes();
                    let [c, d, e, f] = i.k.to_le_bytes();
                    [a, b, i.jt, i.jf, c, d, e, f]
                })
                .collect();
            chain.push((bytes, flags as u32));
        }
        chain.reverse();
        let same = |known: &Vec<u32>| {
            known.len() == chain.len()
                && known.iter().zip(&chain).all(|(&i, (bytes, flags))| {
                    let f = &self.filters[i as usize];
                    f.filter == *bytes && f.flags == Some(*flags)
                })
        };
        if let Some(known) = self.chains.iter().find(|k| same(k)) {
            return Ok(known.clone());
        }
        let mut prev = None;
        let mut indexes = Vec::new();
        for (filter, flags) in chain {
            let index = self.filters.len() as u32;
            self.filters.push(SeccompFilter {
                filter,
                prev,
                flags: Some(flags),
            });
            prev = Some(index);
            indexes.push(index);
        }
        self.chains.push(indexes.clone());
        Ok(indexes)
    }

    /// The image.
    pub fn into_entry(self) -> SeccompEntry {
        SeccompEntry {
            seccomp_filters: self.filters,
        }
    }
}

/// Installs a chain in the running thread, or with `all_threads` in every
/// thread of its process.
pub fn restore_filters(p: &mut Program, table: &SeccompEntry, chain: &[u32], all_threads: bool) {
    for &index in chain {
        // The images were checked when they were read.
        let f = &table.seccomp_filters[index as usize];
        let insns = p.bytes(&f.filter);
        let prog = p.zeroed(16);
        let fprog = (f.filter.len() / 8) as u16;
        p.write(prog, 0, &fprog.to_le_bytes());
        p.point(prog, 8, insns);
        let mut flags = u64::from(f.flags.unwrap_or(0)) & KEPT_FLAGS;
        if all_threads {
            flags |= FILTER_FLAG_TSYNC;
        }
        p.call(
            libc::SYS_seccomp,
            format!("install seccomp filter {index}"),
            &[SET_MODE_FILTER.into(), flags.into(), prog.into()],
        );
    }
}

/// Enters strict mode.
pub fn restore_strict(p: &mut Program) {
    p.call(
        libc::SYS_seccomp,
        "enter strict seccomp",
        &[SET_MODE_STRICT.into(), 0.into(), 0.into()],
    );
}
