//! Work that several threads do at once.

use std::sync::OnceLock;
use std::thread;

/// More threads than this gain nothing: what they wait for is the kernel.
const THREADS_MAX: usize = 4;

/// How many threads are worth having. Asked once: the answer takes a dozen calls.
pub fn threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| {
        let processors = thread::available_parallelism().map_or(1, |n| n.get());
        processors.min(THREADS_MAX)
    })
}

/// Does `work` for all items, those of a thread one after the other, each thread
/// at least `share_min` of them. The results are in the order of the items.
///
/// The threads have the namespaces and credentials of the caller, but nothing
/// that belongs to a thread: they must not use ptrace(2).
pub fn map<T: Sync, R: Send>(
    items: &[T],
    share_min: usize,
    work: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    let work = &work;
    let share = match items.len() <= share_min {
        true => items.len().max(1),
        false => items.len().div_ceil(threads()).max(share_min),
    };
    let mut shares = items.chunks(share);
    let first = shares.next().unwrap_or_default();
    thread::scope(|scope| {
        let others: Vec<_> = shares
            .map(|items| scope.spawn(move || items.iter().map(work).collect::<Vec<_>>()))
            .collect();
        let mut out: Vec<R> = first.iter().map(work).collect();
        for other in others {
            match other.join() {
                Ok(more) => out.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order() {
        for (len, share) in [(0, 1), (1, 1), (7, 2), (1000, 1), (1000, 5000)] {
            let items: Vec<usize> = (0..len).collect();
            let twice: Vec<usize> = items.iter().map(|i| i * 2).collect();
            assert_eq!(map(&items, share, |i| i * 2), twice);
        }
    }
}
