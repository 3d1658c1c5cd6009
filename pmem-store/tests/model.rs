//! The store against a map of names to bytes, against damage and against torn writes.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use proptest::prelude::*;
use rcr_engine::image::{Generation, Generations, ImageSink, ImageSource};
use rcr_pmem_store::layout::region_bytes_needed;
use rcr_pmem_store::region::FileRegion;
use rcr_pmem_store::{Error, Nonce, Reader, Region, Writer};

const NONCE: Nonce = *b"sixteen bytes ok";

type Images = BTreeMap<String, Vec<u8>>;

fn images() -> impl Strategy<Value = Images> {
    let bytes = proptest::collection::vec(any::<u8>(), 0..9000);
    proptest::collection::btree_map("[a-z]{1,12}(/[a-z0-9.-]{1,12})?", bytes, 0..8)
}

fn needed(images: &Images) -> usize {
    region_bytes_needed(images.iter().map(|(name, b)| (name.len(), b.len() as u64))) as usize
}

fn sealed(images: &Images) -> Vec<u8> {
    let mut writer = Writer::create(vec![0xa5; needed(images)], NONCE).unwrap();
    for (number, (name, bytes)) in images.iter().enumerate() {
        if number % 2 == 0 {
            writer.put(name, bytes).unwrap();
        } else {
            writer
                .reserve(name, bytes.len())
                .unwrap()
                .copy_from_slice(bytes);
        }
    }
    assert!(writer.used() <= writer.capacity());
    writer.seal().unwrap()
}

fn content<R: Region>(reader: &Reader<R>) -> Images {
    let names = reader.names();
    names
        .into_iter()
        .map(|n| (n.clone(), reader.get(&n).unwrap().unwrap().to_vec()))
        .collect()
}

fn read(region: Vec<u8>) -> Result<Images, Error> {
    let reader = Reader::open(region, &NONCE)?;
    reader.verify()?;
    Ok(content(&reader))
}

/// Keeps only what was synced, and remembers the medium as it was at each moment
/// of each sync.
struct Lossy {
    volatile: Vec<u8>,
    lasting: Vec<u8>,
    history: Vec<Vec<u8>>,
}

impl Lossy {
    fn new(len: usize) -> Lossy {
        Lossy {
            volatile: vec![0; len],
            lasting: vec![0; len],
            history: vec![],
        }
    }
}

impl Region for Lossy {
    fn bytes(&self) -> &[u8] {
        &self.volatile
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.volatile
    }

    fn sync(&mut self, range: Range<usize>) -> io::Result<()> {
        // Torn at every eighth of a short range, at a few places of a long one.
        let step = (range.len() / 8).max(1);
        for torn in range.clone().step_by(step) {
            let mut medium = self.lasting.clone();
            medium[range.start..torn].copy_from_slice(&self.volatile[range.start..torn]);
            self.history.push(medium);
        }
        self.lasting[range.clone()].copy_from_slice(&self.volatile[range]);
        self.history.push(self.lasting.clone());
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_put_is_got(images in images()) {
        prop_assert_eq!(read(sealed(&images)).unwrap(), images);
    }

    #[test]
    fn a_flipped_byte_is_an_error_or_changes_nothing(
        images in images(), at: prop::sample::Index, flip in 1u8..,
    ) {
        let mut region = sealed(&images);
        let at = at.index(region.len());
        region[at] ^= flip;
        if let Ok(found) = read(region) {
            prop_assert_eq!(found, images);
        }
    }

    #[test]
    fn a_flipped_byte_of_metadata_is_an_error_or_changes_nothing(
        images in images(), at in 0usize..8192, flip in 1u8..,
    ) {
        let mut region = sealed(&images);
        region[at] ^= flip;
        if let Ok(found) = read(region) {
            prop_assert_eq!(found, images);
        }
    }

    #[test]
    fn a_stop_at_any_write_is_unsealed_or_complete(images in images()) {
        let mut region = Lossy::new(needed(&images));
        let mut writer = Writer::create(&mut region, NONCE).unwrap();
        for (name, bytes) in &images {
            writer.put(name, bytes).unwrap();
        }
        writer.seal().unwrap();
        let last = region.history.len() - 1;
        for (at, medium) in region.history.into_iter().enumerate() {
            match read(medium) {
                Ok(found) => prop_assert_eq!(&found, &images),
                Err(Error::NotSealed | Error::Foreign | Error::Damaged { .. }) => {
                    prop_assert!(at < last);
                }
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
    }

    #[test]
    fn a_new_store_over_an_old_one_never_shows_the_old_seal(old in images(), new in images()) {
        let mut region = Lossy::new(needed(&old).max(needed(&new)));
        let mut writer = Writer::create(&mut region, NONCE).unwrap();
        for (name, bytes) in &old {
            writer.put(name, bytes).unwrap();
        }
        writer.seal().unwrap();
        region.history.clear();
        let mut writer = Writer::create(&mut region, NONCE).unwrap();
        for (name, bytes) in &new {
            writer.put(name, bytes).unwrap();
        }
        writer.seal().unwrap();
        for medium in region.history {
            if let Ok(found) = read(medium) {
                prop_assert!(found == new || found == old);
            }
        }
    }

    #[test]
    fn full_says_how_much_is_missing(len in 0usize..20_000, room in 12_288usize..20_000) {
        let mut writer = Writer::create(vec![0; room], NONCE).unwrap();
        match writer.allocate("image", len as u64) {
            Ok(_) => {}
            Err(Error::Full { missing, .. }) => {
                prop_assert!(missing > 0);
                let larger = vec![0; room + missing as usize];
                let mut writer = Writer::create(larger, NONCE).unwrap();
                prop_assert!(writer.allocate("image", len as u64).is_ok());
            }
            Err(error) => prop_assert!(false, "{}", error),
        }
    }
}

#[test]
fn a_store_is_restored_at_most_once() {
    let region = sealed(&Images::from([("a".into(), vec![1; 10])]));
    let mut reader = Reader::open(region, &NONCE).unwrap();
    reader.mark_consumed().unwrap();
    let mut region = reader.into_region();
    assert!(matches!(
        Reader::open(region.clone(), &NONCE),
        Err(Error::Consumed)
    ));
    // One of the two marks is enough.
    region[rcr_pmem_store::layout::superblock::CONSUMED] = 0;
    assert!(matches!(Reader::open(region, &NONCE), Err(Error::Consumed)));
}

#[test]
fn stores_of_others_are_told_apart() {
    let region = sealed(&Images::new());
    assert!(matches!(Reader::open(region, &[0; 16]), Err(Error::Stale)));
    assert!(matches!(
        Reader::open(vec![0; 9000], &NONCE),
        Err(Error::Foreign)
    ));
    assert!(matches!(
        Reader::open(vec![0; 10], &NONCE),
        Err(Error::TooSmall { .. })
    ));
    assert!(matches!(
        Writer::create(vec![0; 9000], NONCE),
        Err(Error::TooSmall { .. })
    ));
    let unfinished = Writer::create(vec![0; 20_000], NONCE).unwrap();
    let bytes = unfinished.region().clone();
    assert!(matches!(Reader::open(bytes, &NONCE), Err(Error::NotSealed)));
}

#[test]
fn names_are_written_once_and_are_names() {
    let mut writer = Writer::create(vec![0; 40_000], NONCE).unwrap();
    writer.put("a", b"1").unwrap();
    assert_eq!(
        writer.put("a", b"2").unwrap_err().kind(),
        io::ErrorKind::AlreadyExists
    );
    assert_eq!(
        writer.put("", b"2").unwrap_err().kind(),
        io::ErrorKind::InvalidInput
    );
    assert_eq!(
        writer.put("b\0", b"2").unwrap_err().kind(),
        io::ErrorKind::InvalidInput
    );
    assert_eq!(
        read(writer.seal().unwrap()).unwrap(),
        Images::from([("a".into(), b"1".to_vec())])
    );
}

#[test]
fn large_images_are_aligned_for_huge_pages() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("region");
    let len = 3 << 20;
    let size = region_bytes_needed([(5, 100), (5, len), (5, len)]);
    let mut writer = Writer::create(FileRegion::create(&path, size).unwrap(), NONCE).unwrap();
    writer.put("small", &[1; 100]).unwrap();
    for name in ["large", "other"] {
        let image = writer.reserve(name, len as usize).unwrap();
        assert_eq!(image.as_ptr() as usize % (2 << 20), 0);
        image.fill(9);
    }
    drop(writer.seal().unwrap());
    let reader = Reader::open(FileRegion::open(&path).unwrap(), &NONCE).unwrap();
    reader.verify().unwrap();
    assert!(
        reader
            .get("large")
            .unwrap()
            .unwrap()
            .iter()
            .all(|&b| b == 9)
    );
    assert_eq!(reader.content_bytes(), 100 + 2 * len);
}

#[test]
fn units_keep_apart_in_one_store() {
    let mut writer = Writer::create(vec![0; 40_000], NONCE).unwrap();
    for unit in ["redis.service", "nginx.service"] {
        Generation::new(&mut writer, format!("{unit}/"))
            .put("core-1.img", unit.as_bytes())
            .unwrap();
    }
    writer.put("manifest.json", b"{}").unwrap();
    let reader = Reader::open(writer.seal().unwrap(), &NONCE).unwrap();
    let redis = Generations::new(&reader, vec!["redis.service/".into()]);
    assert_eq!(redis.names(), ["core-1.img"]);
    assert_eq!(
        redis.get("core-1.img").unwrap(),
        Some(&b"redis.service"[..])
    );
    assert_eq!(redis.get("manifest.json").unwrap(), None);
    assert_eq!(reader.names().len(), 3);
}

proptest! {
    #[test]
    fn what_is_written_is_read_while_the_rest_is_filled(
        rounds in proptest::collection::vec(images(), 1..4),
    ) {
        let named = |n: usize, name: &str| format!("{n}/{name}");
        let all: Images = rounds
            .iter()
            .enumerate()
            .flat_map(|(n, images)| images.iter().map(move |(k, v)| (named(n, k), v.clone())))
            .collect();
        let mut writer = Writer::create(vec![0xa5; needed(&all)], NONCE).unwrap();
        for (n, images) in rounds.iter().enumerate() {
            let (written, mut rest) = writer.split();
            for (name, bytes) in images {
                rest.put(&named(n, name), bytes).unwrap();
            }
            prop_assert_eq!(written.names().len(), rounds[..n].iter().map(Images::len).sum::<usize>());
            for (before, images) in rounds[..n].iter().enumerate() {
                for (name, bytes) in images {
                    let found = written.get(&named(before, name)).unwrap();
                    prop_assert_eq!(found, Some(&bytes[..]));
                }
            }
            if n % 2 == 0 {
                writer.settle();
            }
        }
        let reader = Reader::open(writer.seal().unwrap(), &NONCE).unwrap();
        reader.verify().unwrap();
        for (name, bytes) in &all {
            prop_assert_eq!(reader.get(name).unwrap(), Some(&bytes[..]));
        }
    }
}
