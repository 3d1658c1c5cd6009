//! Stores and locators. Checksums are made right, or nothing would get past
//! them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rcr_engine::image::ImageSource;
use rcr_fuzz::seeds::write_if_asked;
use rcr_pmem_store::layout::{SEALED_MARK, SLOT_LEN, SLOTS, superblock};
use rcr_pmem_store::{Locator, Reader};

fuzz_target!(init: write_if_asked("store"), |bytes: &[u8]| {
    read(bytes.to_vec());
    read(checked(bytes.to_vec()));
    let _ = Locator::from_bytes(bytes);
    if let Some(body) = bytes.len().checked_sub(4).map(|n| &bytes[..n]) {
        let crc = crc32c::crc32c(body).to_le_bytes();
        let _ = Locator::from_bytes(&[body, &crc].concat());
    }
});

fn read(region: Vec<u8>) {
    if let Ok(reader) = Reader::open(region, &[0; 16]) {
        let whole = reader.verify().is_ok();
        for name in reader.names() {
            let image = reader.get(&name).expect("it needs no input");
            assert!(image.is_some() || !whole);
        }
        reader.content_bytes();
    }
}

/// The store with checksums and lengths that fit.
fn checked(mut region: Vec<u8>) -> Vec<u8> {
    let len = region.len() as u64;
    for at in SLOTS {
        let all = region.clone();
        let Some(slot) = region.get_mut(at as usize..(at + SLOT_LEN) as usize) else {
            return region;
        };
        let mut put = |at: usize, bytes: &[u8]| slot[at..at + bytes.len()].copy_from_slice(bytes);
        put(superblock::STORE_LEN, &len.to_le_bytes());
        put(superblock::NONCE, &[0; 16]);
        put(superblock::SEALED, &SEALED_MARK.to_le_bytes());
        put(superblock::CONSUMED, &[0; 8]);
        let word = |at: usize| u64::from_le_bytes(slot[at..at + 8].try_into().expect("8"));
        let from = word(superblock::INDEX_OFFSET);
        let to = from.saturating_add(word(superblock::INDEX_LEN));
        if let Some(index) = all.get(from as usize..to as usize) {
            let crc = crc32c::crc32c(index).to_le_bytes();
            slot[superblock::INDEX_CRC..superblock::INDEX_CRC + 4].copy_from_slice(&crc);
        }
        let crc = crc32c::crc32c(&slot[..superblock::CRC]).to_le_bytes();
        slot[superblock::CRC..superblock::CRC + 4].copy_from_slice(&crc);
    }
    region
}
