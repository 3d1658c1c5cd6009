//! The container around records: header, then length-prefixed messages.
//!
//! ```text
//! u32 0x54564319   common magic (not in inventory.img)
//! u32 type magic
//! { u32 length, message of that length, raw payload or nothing } *
//! ```
//! All numbers are little endian. Whether a payload follows a record, and how
//! long it is, only the record says.

use prost::Message;

use super::{ImageError, ImageSink, ImageSource, Kind};

/// Collects one image in memory.
#[derive(Debug)]
pub struct ImageWriter {
    bytes: Vec<u8>,
}

impl ImageWriter {
    /// An image of that kind without records.
    pub fn new(kind: Kind) -> Self {
        let bytes = kind
            .header()
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        Self { bytes }
    }

    /// Appends a record.
    ///
    /// # Panics
    /// If the encoded record exceeds 4 GiB, which no state of a task does.
    pub fn record<M: Message>(&mut self, record: &M) -> &mut Self {
        let len = u32::try_from(record.encoded_len()).expect("a record is smaller than 4 GiB");
        self.bytes.extend_from_slice(&len.to_le_bytes());
        record
            .encode(&mut self.bytes)
            .expect("a Vec grows as needed");
        self
    }

    /// Appends raw bytes that belong to the record before.
    pub fn payload(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// The whole image.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// An image of that kind with those records.
pub fn write_image<M: Message>(kind: Kind, records: &[M]) -> Vec<u8> {
    let mut w = ImageWriter::new(kind);
    for r in records {
        w.record(r);
    }
    w.finish()
}

/// Walks through one image. Whatever the bytes are, it never panics and never
/// allocates more than a small multiple of what is there.
#[derive(Debug)]
pub struct ImageReader<'a> {
    name: String,
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> ImageReader<'a> {
    /// Checks the header. `name` is for error messages.
    pub fn new(name: &str, kind: Kind, bytes: &'a [u8]) -> Result<Self, ImageError> {
        let mut reader = Self {
            name: name.to_owned(),
            bytes,
            offset: 0,
        };
        for wanted in kind.header() {
            let found = reader.word()?;
            if found != wanted {
                return Err(ImageError::Magic {
                    name: reader.name,
                    found,
                    wanted,
                });
            }
        }
        Ok(reader)
    }

    /// The next record, or `None` at the end.
    pub fn record<M: Message + Default>(&mut self) -> Result<Option<M>, ImageError> {
        if self.offset == self.bytes.len() {
            return Ok(None);
        }
        let at = self.offset;
        let len = self.word()?;
        let body = self.payload(len as u64)?;
        M::decode(body)
            .map(Some)
            .map_err(|source| ImageError::Decode {
                name: self.name.clone(),
                offset: at as u64,
                source,
            })
    }

    /// The next `len` raw bytes.
    pub fn payload(&mut self, len: u64) -> Result<&'a [u8], ImageError> {
        let rest = &self.bytes[self.offset..];
        let taken = usize::try_from(len).ok().and_then(|len| rest.get(..len));
        let taken = taken.ok_or_else(|| ImageError::Truncated {
            name: self.name.clone(),
            offset: self.offset as u64,
            wanted: len,
            left: rest.len() as u64,
        })?;
        self.offset += taken.len();
        Ok(taken)
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        let rest = &self.bytes[self.offset..];
        self.offset = self.bytes.len();
        rest
    }

    fn word(&mut self) -> Result<u32, ImageError> {
        let b = self.payload(4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }
}

/// Stores an image made of records alone.
pub fn put_records<M: Message>(
    sink: &mut dyn ImageSink,
    kind: Kind,
    name: &str,
    records: &[M],
) -> Result<(), ImageError> {
    put_image(sink, name, &write_image(kind, records))
}

/// Stores the bytes of an image.
pub fn put_image(sink: &mut dyn ImageSink, name: &str, bytes: &[u8]) -> Result<(), ImageError> {
    sink.put(name, bytes).map_err(|source| ImageError::Io {
        name: name.to_owned(),
        source,
    })
}

/// All records of an image; none where there is no such image.
pub fn get_records<M: Message + Default>(
    source: &dyn ImageSource,
    kind: Kind,
    name: &str,
) -> Result<Vec<M>, ImageError> {
    let Some(mut reader) = get_reader(source, kind, name)? else {
        return Ok(Vec::new());
    };
    let mut records = Vec::new();
    while let Some(r) = reader.record()? {
        records.push(r);
    }
    Ok(records)
}

/// The first record of an image that must be there.
pub fn get_record<M: Message + Default>(
    source: &dyn ImageSource,
    kind: Kind,
    name: &str,
) -> Result<M, ImageError> {
    let reader = get_reader(source, kind, name)?;
    let record = reader.map(|mut r| r.record()).transpose()?.flatten();
    record.ok_or_else(|| ImageError::Missing {
        name: name.to_owned(),
    })
}

/// A reader over an image, or `None` where there is no such image.
pub fn get_reader<'a>(
    source: &'a dyn ImageSource,
    kind: Kind,
    name: &str,
) -> Result<Option<ImageReader<'a>>, ImageError> {
    let bytes = source.get(name).map_err(|source| ImageError::Io {
        name: name.to_owned(),
        source,
    })?;
    bytes.map(|b| ImageReader::new(name, kind, b)).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::schema::{FileEntry, PipeDataEntry, PstreeEntry};
    use proptest::prelude::*;

    #[test]
    fn header_and_record_are_laid_out_as_other_tools_expect() {
        let entry = PstreeEntry {
            pid: 3,
            ppid: 1,
            pgid: 3,
            sid: 3,
            threads: vec![3, 4],
        };
        let bytes = write_image(Kind::Pstree, &[entry]);
        let expected = [
            0x19, 0x43, 0x56, 0x54, 0x30, 0x30, 0x27, 0x50, 12, 0, 0, 0, // header, length
            8, 3, 16, 1, 24, 3, 32, 3, 40, 3, 40, 4, // unpacked repeated field
        ];
        assert_eq!(bytes, expected);
        let inventory = ImageWriter::new(Kind::Inventory).finish();
        assert_eq!(inventory, [0x16, 0x31, 0x31, 0x58]);
    }

    #[test]
    fn payloads_stand_between_records() {
        let mut w = ImageWriter::new(Kind::PipesData);
        for (id, data) in [(1, b"abc".as_slice()), (2, b"")] {
            let head = PipeDataEntry {
                pipe_id: id,
                bytes: data.len() as u32,
                size: None,
            };
            w.record(&head).payload(data);
        }
        let bytes = w.finish();
        let mut r = ImageReader::new("pipes-data.img", Kind::PipesData, &bytes).unwrap();
        let mut seen = Vec::new();
        while let Some(e) = r.record::<PipeDataEntry>().unwrap() {
            seen.push((e.pipe_id, r.payload(e.bytes.into()).unwrap().to_vec()));
        }
        assert_eq!(seen, [(1, b"abc".to_vec()), (2, Vec::new())]);
    }

    #[test]
    fn another_kind_is_an_error() {
        let bytes = ImageWriter::new(Kind::Core).finish();
        let e = ImageReader::new("mm-1.img", Kind::Mm, &bytes).unwrap_err();
        assert!(matches!(
            e,
            ImageError::Magic {
                found: 0x5505_3847,
                ..
            }
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_give_records_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut image = ImageWriter::new(Kind::Files).finish();
            image.extend_from_slice(&bytes);
            let mut r = ImageReader::new("files.img", Kind::Files, &image).unwrap();
            while let Ok(Some(_)) = r.record::<FileEntry>() {}
            let _ = ImageReader::new("files.img", Kind::Files, &bytes);
        }

        #[test]
        fn records_come_back(pids in proptest::collection::vec(any::<[u32; 4]>(), 0..20)) {
            let entries: Vec<_> = pids
                .iter()
                .map(|&[pid, ppid, pgid, sid]| PstreeEntry { pid, ppid, pgid, sid, threads: vec![pid] })
                .collect();
            let image = write_image(Kind::Pstree, &entries);
            let mut r = ImageReader::new("pstree.img", Kind::Pstree, &image).unwrap();
            let mut back = Vec::new();
            while let Some(e) = r.record::<PstreeEntry>().unwrap() {
                back.push(e);
            }
            prop_assert_eq!(back, entries);
        }

        #[test]
        fn a_cut_image_is_an_error_not_fewer_records(cut in 9usize..19) {
            let entry = PstreeEntry { pid: 3, ppid: 1, pgid: 3, sid: 3, threads: vec![3] };
            let image = write_image(Kind::Pstree, &[entry]);
            let mut r = ImageReader::new("pstree.img", Kind::Pstree, &image[..cut]).unwrap();
            prop_assert!(r.record::<PstreeEntry>().is_err());
        }
    }
}
