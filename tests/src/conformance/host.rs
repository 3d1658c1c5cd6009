//! What a program needs of the whole host, given back afterwards.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::case::Unavailable;
use super::sys;

const NR_HUGEPAGES: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages of the usual size that were reserved; given back on drop.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
}

impl HugePages {
    /// Reserves `count` more.
    pub fn reserve(count: u64) -> Result<Self> {
        let read = || -> Result<u64> { Ok(fs::read_to_string(NR_HUGEPAGES)?.trim().parse()?) };
        let Ok(before) = read() else {
            return Err(Unavailable::because("the kernel has no huge pages"));
        };
        let pages = Self { before };
        fs::write(NR_HUGEPAGES, (before + count).to_string()).context(NR_HUGEPAGES)?;
        if read()? < before + count {
            return Err(Unavailable::because("no memory for huge pages"));
        }
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(e) = fs::write(NR_HUGEPAGES, self.before.to_string()) {
            eprintln!("{NR_HUGEPAGES}: {e}");
        }
    }
}

/// A swap file in use; given up on drop.
#[derive(Debug)]
pub struct Swap(PathBuf);

impl Swap {
    /// Makes a file of `mib` MiB at `path` and swaps to it.
    pub fn on(path: &Path, mib: u64) -> Result<Self> {
        // mm/swapfile.c: the header ends the first page.
        let mut head = vec![0; sys::PAGE];
        head[1024..1028].copy_from_slice(&1_u32.to_le_bytes());
        let last = (mib << 20) / sys::PAGE as u64 - 1;
        head[1028..1032].copy_from_slice(&(last as u32).to_le_bytes());
        head[sys::PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
        let file = fs::File::create(path)?;
        let zeros = vec![0; 1 << 20];
        for n in 0..mib {
            file.write_all_at(&zeros, n << 20)?;
        }
        file.write_all_at(&head, 0)?;
        file.sync_all()?;
        let name = std::ffi::CString::new(path.to_str().context("path")?)?;
        // SAFETY: the name lives through the call.
        match unsafe { sys::call(libc::SYS_swapon, [name.as_ptr() as u64, 0, 0, 0, 0, 0]) } {
            Ok(_) => Ok(Self(path.to_owned())),
            Err(e) => Err(Unavailable::because(format!("swapon: {e}"))),
        }
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let Some(name) = self.0.to_str().and_then(|n| std::ffi::CString::new(n).ok()) else {
            return;
        };
        let args = [name.as_ptr() as u64, 0, 0, 0, 0, 0];
        // SAFETY: the name lives through the call.
        let off = unsafe { sys::call(libc::SYS_swapoff, args) };
        if let Err(e) = off {
            eprintln!("swapoff: {e}");
        }
    }
}
