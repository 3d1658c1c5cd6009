//! Mappings whose place only the kernel may choose: those of an io_uring. It is
//! left one place to choose, with something everywhere else for that moment.

use super::MemoryError;
use super::maps;
use super::pagemap::PAGE;
use crate::image::schema::VmaEntry;
use crate::remote::{Arena, Program, Tracee};

/// Behind the last address that the kernel chooses by itself.
const END: u64 = 0x7fff_ffff_f000;
/// Below, the first process of all may not map anything either.
const START: u64 = 64 << 10;

/// What is free between `taken`, which is in order.
fn gaps(taken: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut at = START;
    let mut out = Vec::new();
    for &(start, end) in taken.iter().chain(&[(END, END)]) {
        if start.min(END) > at {
            out.push((at, start.min(END)));
        }
        at = at.max(end);
    }
    out
}

/// Maps a descriptor that the target has as number `fd` where it was.
pub fn restore(tracee: Tracee, arena: Arena, e: &VmaEntry, fd: i32) -> Result<(), MemoryError> {
    let failed = |what: String| MemoryError::Place { at: e.start, what };
    let vmas = maps::read_ranges(tracee.tid).map_err(|e| failed(e.to_string()))?;
    let mut taken: Vec<(u64, u64)> = vmas.iter().map(|v| (v.start, v.end)).collect();
    if taken.iter().any(|t| t.0 < e.end && e.start < t.1) {
        return Err(failed("something is there already".into()));
    }
    taken.push((e.start, e.end));
    taken.sort_unstable();
    let gaps = gaps(&taken);
    let mut p = Program::new();
    let flags =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    for (start, end) in &gaps {
        let args = [
            (*start).into(),
            (end - start).into(),
            libc::PROT_NONE.into(),
            flags.into(),
            (-1).into(),
            0.into(),
        ];
        p.call(libc::SYS_mmap, "fill what is free for a moment", &args);
    }
    let args = [
        0.into(),
        (e.end - e.start).into(),
        u64::from(e.prot).into(),
        (e.flags as i32).into(),
        fd.into(),
        e.pgoff.into(),
    ];
    let mapped = p.call(
        libc::SYS_mmap,
        format!("map {:x}-{:x}", e.start, e.end),
        &args,
    );
    for (start, end) in &gaps {
        let args = [(*start).into(), (end - start).into()];
        p.call(libc::SYS_munmap, "free it again", &args);
    }
    let at = tracee.run(arena, &p)?.result(mapped) as u64;
    match at == e.start && at.is_multiple_of(PAGE) {
        true => Ok(()),
        false => Err(failed(format!("the kernel chose {at:x}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_all_that_is_free() {
        let taken = [(0x1000, 0x2000), (0x20000, 0x30000), (0x30000, 0x31000)];
        let found = gaps(&taken);
        assert_eq!(found, [(START, 0x20000), (0x31000, END)]);
        let stack = [(0x10000, END - 0x1000), (END - 0x1000, END + 0x1000)];
        assert_eq!(gaps(&stack), []);
    }
}
