//! Checksums of many images at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use xxhash_rust::xxh3::xxh3_64;

use crate::layout::HASH_CHUNK;

/// More threads than this gain nothing: memory bandwidth is the limit.
const THREADS_MAX: usize = 4;

/// The checksum of each image, in order: xxh3-64 over the little-endian xxh3-64 of
/// each chunk, so that one large image keeps several processors busy.
pub(crate) fn hash_all(images: &[&[u8]]) -> Vec<u64> {
    let chunks: Vec<(usize, &[u8])> = images
        .iter()
        .enumerate()
        .flat_map(|(number, image)| image.chunks(HASH_CHUNK).map(move |chunk| (number, chunk)))
        .collect();
    let hashes = hash_chunks(&chunks);
    let mut lists = vec![Vec::new(); images.len()];
    for ((number, _), hash) in chunks.iter().zip(hashes) {
        lists[*number].extend(hash.to_le_bytes());
    }
    lists.iter().map(|list| xxh3_64(list)).collect()
}

fn hash_chunks(chunks: &[(usize, &[u8])]) -> Vec<u64> {
    let threads = thread::available_parallelism()
        .map_or(1, |n| n.get())
        .min(THREADS_MAX);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        while let Some((at, (_, chunk))) = {
            let at = next.fetch_add(1, Ordering::Relaxed);
            chunks.get(at).map(|chunk| (at, chunk))
        } {
            done.push((at, xxh3_64(chunk)));
        }
        done
    };
    let mut hashes = vec![0; chunks.len()];
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(chunks.len()))
            .map(|_| scope.spawn(work))
            .collect();
        let own = work();
        let results = others
            .into_iter()
            .map(|other| other.join().expect("hashing never panics"));
        for (at, hash) in results.chain([own]).flatten() {
            hashes[at] = hash;
        }
    });
    hashes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_what_the_format_says_and_in_order() {
        let images: Vec<Vec<u8>> = [0, 1, 100, HASH_CHUNK, HASH_CHUNK + 1, 3 * HASH_CHUNK, 7]
            .iter()
            .map(|&len| (0..len).map(|n| (n * 7 + len) as u8).collect())
            .collect();
        let slices: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
        let expected: Vec<u64> = slices
            .iter()
            .map(|image| {
                let chunks = image.chunks(HASH_CHUNK);
                xxh3_64(
                    &chunks
                        .flat_map(|c| xxh3_64(c).to_le_bytes())
                        .collect::<Vec<u8>>(),
                )
            })
            .collect();
        assert_eq!(hash_all(&slices), expected);
        assert!(hash_all(&[]).is_empty());
    }
}
