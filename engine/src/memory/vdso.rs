//! The vDSO across kernels.
//!
//! User code holds pointers into the vDSO it started with: libc caches the
//! functions' addresses, the auxiliary vector names the image. On the kernel
//! that made the dump the new process's vDSO is simply moved to the old
//! addresses. On another one the old text stays where it was, as ordinary
//! memory, with every exported function turned into a jump to its namesake in
//! the new kernel's vDSO, which lives elsewhere.

use std::collections::BTreeMap;
use std::ops::Range;

use super::MemoryError;
use super::maps::Vma;

/// The vDSO of a process: data pages and text, which must stay together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vdso {
    /// The text.
    pub text: Range<u64>,
    /// The data mappings.
    pub vvar: Vec<Range<u64>>,
}

impl Vdso {
    /// Finds it among the mappings of a process.
    pub fn find(vmas: &[Vma]) -> Option<Self> {
        let text = vmas.iter().find(|v| v.is_named("[vdso]"))?;
        let vvar = vmas.iter().filter(|v| v.name.starts_with(b"[vvar"));
        Some(Self {
            text: text.start..text.end,
            vvar: vvar.map(|v| v.start..v.end).collect(),
        })
    }

    /// All its mappings, in address order.
    pub fn parts(&self) -> Vec<Range<u64>> {
        let mut parts = self.vvar.clone();
        parts.push(self.text.clone());
        parts.sort_by_key(|r| r.start);
        parts
    }

    /// From its first to its last byte.
    pub fn span(&self) -> Range<u64> {
        let parts = self.parts();
        parts[0].start..parts[parts.len() - 1].end
    }

    /// Whether another one has the same shape, wherever it lies.
    pub fn same_shape(&self, other: &Vdso) -> bool {
        let shape = |v: &Vdso| {
            let base = v.text.start;
            let parts = v.parts();
            let rel = |a: u64| a.wrapping_sub(base);
            parts
                .into_iter()
                .map(|r| (rel(r.start), rel(r.end)))
                .collect::<Vec<_>>()
        };
        shape(self) == shape(other)
    }
}

/// Functions that a kernel may lack, and the system call behind each
/// (arch/x86/entry/vdso/vdso.lds.S).
const CALLS: &[(&str, i64)] = &[
    ("clock_gettime", libc::SYS_clock_gettime),
    ("gettimeofday", libc::SYS_gettimeofday),
    ("time", libc::SYS_time),
    ("getcpu", libc::SYS_getcpu),
    ("clock_getres", libc::SYS_clock_getres),
    ("getrandom", libc::SYS_getrandom),
];

/// Old text in which every function jumps to the new one at `new_base`.
pub fn redirect(old: &[u8], new: &[u8], new_base: u64) -> Result<Vec<u8>, MemoryError> {
    let old_functions = functions(old)?;
    let new_functions = functions(new)?;
    let mut text = old.to_vec();
    for (name, f) in &old_functions {
        let code = match new_functions.get(name) {
            Some(target) => jump(new_base + target.offset),
            None => match CALLS.iter().find(|(n, _)| name.ends_with(n)) {
                Some(&(_, nr)) => call(nr),
                None => continue,
            },
        };
        let from = f.offset as usize;
        let room = f.size.min(text.len() as u64 - f.offset) as usize;
        if room < code.len() {
            return Err(MemoryError::Vdso(format!("{name} has only {room} bytes")));
        }
        text[from..from + code.len()].copy_from_slice(&code);
    }
    Ok(text)
}

/// `movabs rax, target; jmp rax`: rax is free at a function's entry.
fn jump(target: u64) -> Vec<u8> {
    let mut code = vec![0x48, 0xb8];
    code.extend_from_slice(&target.to_le_bytes());
    code.extend_from_slice(&[0xff, 0xe0]);
    code
}

/// `mov eax, nr; mov r10, rcx; syscall; ret`.
fn call(nr: i64) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend_from_slice(&(nr as u32).to_le_bytes());
    code.extend_from_slice(&[0x49, 0x89, 0xca, 0x0f, 0x05, 0xc3]);
    code
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Function {
    offset: u64,
    size: u64,
}

/// The exported functions of a vDSO image (ELF64, little endian).
fn functions(elf: &[u8]) -> Result<BTreeMap<String, Function>, MemoryError> {
    let bad = |what: &str| MemoryError::Vdso(format!("not understood: {what}"));
    // What is out of range stays so, and is found to be when it is read.
    let sum = u64::saturating_add;
    let bytes = |o: u64, n: u64| -> Result<&[u8], MemoryError> {
        let end = o.checked_add(n).ok_or_else(|| bad("offset"))?;
        elf.get(o as usize..end as usize)
            .ok_or_else(|| bad("offset"))
    };
    let u16_at = |o| bytes(o, 2).map(|b| u64::from(u16::from_le_bytes([b[0], b[1]])));
    let u32_at = |o| bytes(o, 4).map(|b| u64::from(u32::from_le_bytes(b.try_into().expect("4"))));
    let u64_at = |o| bytes(o, 8).map(|b| u64::from_le_bytes(b.try_into().expect("8")));
    if bytes(0, 6)? != [0x7f, b'E', b'L', b'F', 2, 1] {
        return Err(bad("no ELF64 header"));
    }
    let (phoff, phentsize, phnum) = (u64_at(32)?, u16_at(54)?, u16_at(56)?);
    let (mut dynamic, mut load) = (None, None);
    for i in 0..phnum {
        let at = sum(phoff, i * phentsize);
        match u32_at(at)? {
            1 if load.is_none() => load = Some(u64_at(sum(at, 16))?),
            2 => dynamic = Some((u64_at(sum(at, 8))?, u64_at(sum(at, 32))?)),
            _ => {}
        }
    }
    // Addresses in the image count from where its first segment is linked.
    let load = load.ok_or_else(|| bad("no PT_LOAD"))?;
    let (dyn_at, dyn_len) = dynamic.ok_or_else(|| bad("no PT_DYNAMIC"))?;
    let (mut symtab, mut strtab, mut strsz, mut hash, mut gnu_hash) = (None, None, 0, None, None);
    for i in 0..dyn_len / 16 {
        let entry = sum(dyn_at, i * 16);
        let (tag, value) = (u64_at(entry)?, u64_at(sum(entry, 8))?);
        let at = value.wrapping_sub(load);
        match tag {
            0 => break,
            4 => hash = Some(at),
            5 => strtab = Some(at),
            6 => symtab = Some(at),
            10 => strsz = value,
            0x6fff_fef5 => gnu_hash = Some(at),
            _ => {}
        }
    }
    let symtab = symtab.ok_or_else(|| bad("no symbol table"))?;
    let strtab = strtab.ok_or_else(|| bad("no string table"))?;
    let count = match (hash, gnu_hash) {
        (Some(h), _) => u32_at(sum(h, 4))?,
        // Without the classic hash table: symbols end where strings begin.
        (None, Some(_)) if strtab > symtab => (strtab - symtab) / 24,
        _ => return Err(bad("no hash table")),
    };
    let mut out = BTreeMap::new();
    for i in 0..count.min(1024) {
        let at = sum(symtab, i * 24);
        let (name, info, shndx) = (u32_at(at)?, bytes(sum(at, 4), 1)?[0], u16_at(sum(at, 6))?);
        if info & 0xf != 2 || shndx == 0 || name >= strsz {
            continue;
        }
        let text = bytes(sum(strtab, name), strsz - name)?;
        let end = text
            .iter()
            .position(|&b| b == 0)
            .ok_or_else(|| bad("name"))?;
        let name = String::from_utf8_lossy(&text[..end]).into_owned();
        let offset = u64_at(sum(at, 8))?.wrapping_sub(load);
        if offset as usize >= elf.len() {
            return Err(bad("symbol"));
        }
        out.insert(
            name,
            Function {
                offset,
                size: u64_at(sum(at, 16))?,
            },
        );
    }
    if out.is_empty() {
        return Err(bad("no functions"));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::maps;
    use crate::sys::process::{Span, read_memory};

    fn own() -> (Vdso, Vec<u8>) {
        let pid = std::process::id() as i32;
        let vdso = Vdso::find(&maps::read_ranges(pid).unwrap()).unwrap();
        let mut text = vec![0; (vdso.text.end - vdso.text.start) as usize];
        read_memory(
            pid,
            &[Span {
                start: vdso.text.start,
                len: text.len(),
            }],
            &mut text,
        )
        .unwrap();
        (vdso, text)
    }

    #[test]
    fn knows_this_kernels_functions() {
        let (_, text) = own();
        let f = functions(&text).unwrap();
        assert!(f.contains_key("__vdso_clock_gettime"), "{f:?}");
    }

    /// Runs an old vDSO that was turned into jumps to the real one.
    #[test]
    fn redirected_functions_work() {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect};
        let (vdso, text) = own();
        let jumps = redirect(&text, &text, vdso.text.start).unwrap();
        let len = std::num::NonZeroUsize::new(jumps.len()).unwrap();
        let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping filled with the redirected image, made
        // executable; the function called has this prototype and is reached
        // through the jump under test.
        let (r, ts) = unsafe {
            let map = mmap_anonymous(None, len, rw, MapFlags::MAP_PRIVATE).unwrap();
            std::ptr::copy_nonoverlapping(jumps.as_ptr(), map.as_ptr().cast(), jumps.len());
            mprotect(map, len.get(), ProtFlags::PROT_READ | ProtFlags::PROT_EXEC).unwrap();
            let at = functions(&text).unwrap()["__vdso_clock_gettime"].offset as usize;
            let f: extern "C" fn(i32, *mut libc::timespec) -> i32 =
                std::mem::transmute(map.as_ptr().byte_add(at));
            let mut ts = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            (f(libc::CLOCK_MONOTONIC, &mut ts), ts)
        };
        assert_eq!(r, 0);
        let now = crate::sys::process::clock_ns(libc::CLOCK_MONOTONIC);
        let then = ts.tv_sec * 1_000_000_000 + ts.tv_nsec;
        assert!((0..10_000_000_000).contains(&(now - then)), "{then} {now}");
    }

    /// A function the new kernel lacks becomes a plain system call.
    #[test]
    fn missing_functions_become_calls() {
        let c = call(libc::SYS_getcpu);
        assert_eq!(c[0], 0xb8);
        assert_eq!(&c[5..], [0x49, 0x89, 0xca, 0x0f, 0x05, 0xc3]);
    }

    #[test]
    fn places_out_of_range_are_errors() {
        let (_, text) = own();
        let word = |at: usize| u64::from_le_bytes(text[at..at + 8].try_into().unwrap());
        let headers = word(32) as usize;
        let dynamic = (0..8)
            .map(|i| headers + i * 56)
            .find(|&at| text[at] == 2)
            .unwrap();
        let entries = word(dynamic + 8) as usize;
        let at_tag = |tag| {
            let mut all = (0..64).map(|i| entries + i * 16);
            all.find(|&at| word(at) == tag).unwrap() + 8
        };
        // Program headers, the dynamic section, symbols, strings.
        for at in [32, dynamic + 8, at_tag(6), at_tag(5)] {
            for far in [u64::MAX, u64::MAX - 7, u64::MAX - 23, 1 << 63] {
                let mut text = text.clone();
                text[at..at + 8].copy_from_slice(&far.to_le_bytes());
                assert!(functions(&text).is_err(), "{far:x} at {at:x}");
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn torn_images_are_errors(cut in 0usize..8192, flip in 0usize..8192, bit in 0u8..8) {
            let (_, mut text) = own();
            let n = text.len();
            text[flip % n] ^= 1 << bit;
            text.truncate(cut.min(n));
            let _ = functions(&text);
        }
    }
}
