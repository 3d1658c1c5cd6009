//! Checksums of many extents at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use xxhash_rust::xxh3::xxh3_64;

/// More threads than this gain nothing: memory bandwidth is the limit.
const THREADS_MAX: usize = 4;

/// The xxh3-64 of each slice, in order.
pub(crate) fn hash_all(extents: &[&[u8]]) -> Vec<u64> {
    let threads = thread::available_parallelism().map_or(1, |n| n.get()).min(THREADS_MAX);
    let threads = threads.min(extents.len());
    if threads <= 1 {
        return extents.iter().map(|extent| xxh3_64(extent)).collect();
    }
    let next = AtomicUsize::new(0);
    let mut hashes = vec![0; extents.len()];
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut done = Vec::new();
                    while let Some((at, extent)) = {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        extents.get(at).map(|extent| (at, extent))
                    } {
                        done.push((at, xxh3_64(extent)));
                    }
                    done
                })
            })
            .collect();
        for worker in workers {
            for (at, hash) in worker.join().expect("hashing does not panic") {
                hashes[at] = hash;
            }
        }
    });
    hashes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_come_in_the_order_of_the_extents() {
        let extents: Vec<Vec<u8>> = (0..50u8).map(|n| vec![n; 1 + n as usize * 100]).collect();
        let slices: Vec<&[u8]> = extents.iter().map(Vec::as_slice).collect();
        let expected: Vec<u64> = slices.iter().map(|s| xxh3_64(s)).collect();
        assert_eq!(hash_all(&slices), expected);
        assert!(hash_all(&[]).is_empty());
    }
}
