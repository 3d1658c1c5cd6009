//! Large transfers of memory by several threads: one does not use what the
//! machine's memory gives.

use std::thread;

use crate::sys::process::{Span, read_memory, write_parts};
use crate::sys::{SysResult, parallel};

use super::pagemap::PAGE;

/// Less than this for each is not worth a thread.
const SHARE_MIN: usize = 8 << 20;
/// How often the processor is left to a thread that ends.
const YIELDS_MAX: usize = 100;

/// Where bytes go, and they.
type Part<'a> = (u64, &'a [u8]);

/// Fills `buf` from the spans, one after the other.
pub fn read(pid: i32, spans: &[Span], buf: &mut [u8]) -> SysResult<()> {
    let share = share(buf.len());
    if share >= buf.len() {
        return read_memory(pid, spans, buf);
    }
    let bufs: Vec<&mut [u8]> = buf.chunks_mut(share).collect();
    let lists = divide(spans, share, |s| s.len, cut_span);
    at_once(lists.into_iter().zip(bufs), |(spans, buf)| {
        read_memory(pid, &spans, buf)
    })
}

/// Writes pieces of memory, each to its address.
pub fn write(pid: i32, parts: &[Part<'_>]) -> SysResult<()> {
    let all = parts.iter().map(|(_, bytes)| bytes.len()).sum();
    let share = share(all);
    if share >= all {
        return write_parts(pid, parts);
    }
    let lists = divide(parts, share, |p| p.1.len(), cut_part);
    at_once(lists.into_iter(), |parts| write_parts(pid, &parts))
}

/// How much each thread does, in whole pages.
fn share(all: usize) -> usize {
    if all <= SHARE_MIN {
        return SHARE_MIN;
    }
    let share = all.div_ceil(parallel::threads()).max(SHARE_MIN);
    share.next_multiple_of(PAGE as usize)
}

fn cut_span(s: Span, at: usize) -> (Span, Span) {
    let rest = Span {
        start: s.start + at as u64,
        len: s.len - at,
    };
    (Span { len: at, ..s }, rest)
}

fn cut_part((at, bytes): Part<'_>, len: usize) -> (Part<'_>, Part<'_>) {
    let (head, tail) = bytes.split_at(len);
    ((at, head), (at + len as u64, tail))
}

/// The items in lists of `share` bytes each, cut where one is too long.
fn divide<T: Copy>(
    items: &[T],
    share: usize,
    len: impl Fn(&T) -> usize,
    cut: impl Fn(T, usize) -> (T, T),
) -> Vec<Vec<T>> {
    let mut lists = vec![Vec::new()];
    let mut room = share;
    for &item in items {
        let mut rest = item;
        loop {
            if room == 0 {
                lists.push(Vec::new());
                room = share;
            }
            let list = lists.last_mut().expect("there is one from the start");
            if len(&rest) <= room {
                room -= len(&rest);
                list.push(rest);
                break;
            }
            let (head, tail) = cut(rest, room);
            list.push(head);
            (rest, room) = (tail, 0);
        }
    }
    lists
}

/// Does all of it, each in a thread of its own.
fn at_once<T: Send>(
    work: impl Iterator<Item = T>,
    each: impl Fn(T) -> SysResult<()> + Sync,
) -> SysResult<()> {
    let each = &each;
    let before = own_threads();
    let done = thread::scope(|scope| {
        let all: Vec<_> = work.map(|w| scope.spawn(move || each(w))).collect();
        // All of them are waited for before the first failure is told.
        let results: Vec<_> = all.into_iter().map(|t| t.join()).collect();
        let result = |r: thread::Result<_>| r.unwrap_or_else(|p| std::panic::resume_unwind(p));
        results.into_iter().try_for_each(result)
    });
    // A joined thread is still on its way out, and some calls of ours ask for
    // there being no other (setns(2)).
    for _ in 0..YIELDS_MAX {
        if own_threads() <= before {
            break;
        }
        thread::yield_now();
    }
    done
}

/// Threads of this process, as links of a directory.
fn own_threads() -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self/task").map_or(0, |m| m.nlink())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_by_several_is_read_by_several() {
        const LEN: usize = 4 * SHARE_MIN + 4096;
        let mut target = vec![0_u8; LEN];
        let source: Vec<u8> = (0..LEN).map(|i| (i / 4096 + i) as u8).collect();
        let me = std::process::id() as i32;
        let base = target.as_mut_ptr() as u64;
        // Backwards, in pieces of odd sizes.
        let mut parts = Vec::new();
        let mut at = LEN;
        for size in [1, 4095, 3 * SHARE_MIN / 2, SHARE_MIN, LEN].iter().cycle() {
            let from = at.saturating_sub(*size);
            parts.push((base + from as u64, &source[from..at]));
            at = from;
            if at == 0 {
                break;
            }
        }
        write(me, &parts).unwrap();
        let spans = parts.iter().map(|(start, b)| Span {
            start: *start,
            len: b.len(),
        });
        let spans: Vec<Span> = spans.collect();
        let mut back = vec![0; LEN];
        read(me, &spans, &mut back).unwrap();
        let expected: Vec<u8> = parts.iter().flat_map(|(_, b)| b.iter().copied()).collect();
        assert!(target == source && back == expected);
    }

    #[test]
    fn a_failure_of_one_is_told() {
        let mut buf = vec![0; 2 * SHARE_MIN];
        let nowhere = Span {
            start: 4096,
            len: buf.len(),
        };
        assert!(read(std::process::id() as i32, &[nowhere], &mut buf).is_err());
    }
}
