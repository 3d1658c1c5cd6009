//! The compressions that kernels take for initrds and modules.

use std::io::{self, BufRead, Read};

use flate2::bufread::GzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::StreamingDecoder;

/// Largest decoder memory, in KiB, that an xz stream may ask for.
const XZ_MEMORY_KIB_MAX: u32 = 192 * 1024;

/// Magic of the lz4 format that kernels read (`lz4 -l`).
const LZ4_LEGACY_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// Uncompressed size of a legacy lz4 block, fixed by the format.
const LZ4_LEGACY_BLOCK_BYTES: usize = 8 << 20;

/// A compression, recognised by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// gzip
    Gzip,
    /// Zstandard
    Zstd,
    /// xz
    Xz,
    /// lz4 in its legacy framing
    Lz4,
}

/// Why compressed bytes could not be read.
#[derive(Debug, thiserror::Error)]
pub enum CompressError {
    /// The kernel may know this one; this program does not.
    #[error("compressed with {name}, which is not supported")]
    Unsupported {
        /// The compression's name.
        name: &'static str,
    },
    /// The stream is damaged or cut off.
    #[error("the {what:?} stream is damaged")]
    Damaged {
        /// What it is compressed with.
        what: Compression,
        /// What the decoder said.
        source: io::Error,
    },
    /// More came out than is sensible.
    #[error("unpacks to more than {limit_bytes} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit_bytes: u64,
    },
}

impl Compression {
    /// Recognises the compression of `bytes`; `None` where they look like no
    /// compressed stream at all.
    pub fn detect(bytes: &[u8]) -> Result<Option<Self>, CompressError> {
        let known: [(&[u8], Self); 4] = [
            (&[0x1f, 0x8b], Self::Gzip),
            (&[0x28, 0xb5, 0x2f, 0xfd], Self::Zstd),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Self::Xz),
            (&LZ4_LEGACY_MAGIC, Self::Lz4),
        ];
        if let Some((_, found)) = known.iter().find(|(magic, _)| bytes.starts_with(magic)) {
            return Ok(Some(*found));
        }
        let unsupported: [(&[u8], &'static str); 4] = [
            (b"BZh", "bzip2"),
            (&[0x5d, 0x00, 0x00], "lzma"),
            (&[0x89, b'L', b'Z', b'O'], "lzo"),
            (&[0x04, 0x22, 0x4d, 0x18], "lz4 in its new framing"),
        ];
        match unsupported
            .iter()
            .find(|(magic, _)| bytes.starts_with(magic))
        {
            Some((_, name)) => Err(CompressError::Unsupported { name }),
            None => Ok(None),
        }
    }

    /// A reader of what is compressed at the beginning of `input`. Once it has
    /// been read to its end and dropped, `input` begins behind the stream.
    pub fn reader<'i, 'b: 'i>(self, input: &'i mut &'b [u8]) -> io::Result<Box<dyn Read + 'i>> {
        Ok(match self {
            Compression::Gzip => Box::new(GzDecoder::new(input)),
            Compression::Zstd => Box::new(StreamingDecoder::new(input).map_err(io::Error::other)?),
            Compression::Xz => Box::new(XzReader::new_mem_limit(input, false, XZ_MEMORY_KIB_MAX)),
            Compression::Lz4 => Box::new(Lz4Legacy::new(input)?),
        })
    }

    /// Unpacks all of `bytes` into memory, at most `limit_bytes`.
    pub fn unpack(self, mut bytes: &[u8], limit_bytes: u64) -> Result<Vec<u8>, CompressError> {
        let damaged = |source| CompressError::Damaged { what: self, source };
        let mut out = Vec::new();
        self.reader(&mut bytes)
            .and_then(|reader| reader.take(limit_bytes + 1).read_to_end(&mut out))
            .map_err(damaged)?;
        if out.len() as u64 > limit_bytes {
            return Err(CompressError::TooLarge { limit_bytes });
        }
        Ok(out)
    }
}

/// Reads the legacy lz4 framing: a magic, then blocks of a little-endian length
/// and that many compressed bytes, until the input ends or something follows
/// that is no block.
struct Lz4Legacy<'i, 'b> {
    input: &'i mut &'b [u8],
    block: io::Cursor<Vec<u8>>,
}

impl<'i, 'b> Lz4Legacy<'i, 'b> {
    fn new(input: &'i mut &'b [u8]) -> io::Result<Self> {
        *input = input
            .strip_prefix(&LZ4_LEGACY_MAGIC)
            .ok_or(io::ErrorKind::InvalidData)?;
        Ok(Lz4Legacy {
            input,
            block: io::Cursor::new(Vec::new()),
        })
    }

    /// The next block's compressed bytes, taken off the input.
    fn next_block(&mut self) -> io::Result<Option<&'b [u8]>> {
        while let Some(rest) = self.input.strip_prefix(&LZ4_LEGACY_MAGIC) {
            *self.input = rest;
        }
        let Some((head, rest)) = self.input.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let len = u32::from_le_bytes(*head) as usize;
        // Padding, or the next archive: neither can be the length of a block.
        if len == 0 || len > lz4_flex::block::get_maximum_output_size(LZ4_LEGACY_BLOCK_BYTES) {
            return Ok(None);
        }
        let (block, rest) = rest
            .split_at_checked(len)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        *self.input = rest;
        Ok(Some(block))
    }
}

impl Read for Lz4Legacy<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.block.fill_buf()?.is_empty() {
            let Some(block) = self.next_block()? else {
                return Ok(0);
            };
            let bytes = lz4_flex::block::decompress(block, LZ4_LEGACY_BLOCK_BYTES)
                .map_err(io::Error::other)?;
            self.block = io::Cursor::new(bytes);
        }
        self.block.read(buf)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    /// One stored (uncompressed) lz4 sequence per block, as the format allows.
    pub(crate) fn lz4(bytes: &[u8]) -> Vec<u8> {
        let mut out = LZ4_LEGACY_MAGIC.to_vec();
        for chunk in bytes.chunks(LZ4_LEGACY_BLOCK_BYTES) {
            let mut block = Vec::new();
            if chunk.len() < 15 {
                block.push((chunk.len() as u8) << 4);
            } else {
                block.push(0xf0);
                let mut rest = chunk.len() - 15;
                while rest >= 255 {
                    block.push(255);
                    rest -= 255;
                }
                block.push(rest as u8);
            }
            block.extend_from_slice(chunk);
            out.extend_from_slice(&(block.len() as u32).to_le_bytes());
            out.extend_from_slice(&block);
        }
        out
    }

    /// Packs with the `xz` program; `None` where there is none.
    pub(crate) fn xz(bytes: &[u8]) -> Option<Vec<u8>> {
        let mut child = Command::new("xz")
            .args(["--check=crc32", "-0c"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        child.stdin.take()?.write_all(bytes).ok()?;
        Some(child.wait_with_output().ok()?.stdout)
    }

    #[test]
    fn every_compression_unpacks_and_leaves_what_follows() {
        let text: Vec<u8> = (0..300_000u32)
            .flat_map(|i| (i / 7).to_le_bytes())
            .collect();
        let mut packed = vec![
            (Compression::Gzip, gzip(&text)),
            (Compression::Zstd, zstd(&text)),
            (Compression::Lz4, lz4(&text)),
        ];
        packed.extend(xz(&text).map(|bytes| (Compression::Xz, bytes)));
        for (compression, mut bytes) in packed {
            assert_eq!(Compression::detect(&bytes).unwrap(), Some(compression));
            assert_eq!(compression.unpack(&bytes, 1 << 30).unwrap(), text);
            assert!(matches!(
                compression.unpack(&bytes, 1000),
                Err(CompressError::TooLarge { limit_bytes: 1000 })
            ));
            bytes.extend_from_slice(b"\0\0\0\0next");
            let mut rest = bytes.as_slice();
            let mut out = Vec::new();
            compression
                .reader(&mut rest)
                .unwrap()
                .read_to_end(&mut out)
                .unwrap();
            assert_eq!(out, text);
            assert_eq!(rest, b"\0\0\0\0next", "{compression:?}");
        }
    }

    #[test]
    fn foreign_compressions_are_named() {
        for (magic, expected) in [(&b"BZh91AY"[..], "bzip2"), (&[0x5d, 0, 0, 0x80], "lzma")] {
            match Compression::detect(magic) {
                Err(CompressError::Unsupported { name }) => assert_eq!(name, expected),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(Compression::detect(b"070701"), Ok(None)));
    }

    proptest::proptest! {
        #[test]
        fn damaged_streams_are_errors_not_panics(noise: Vec<u8>, which in 0usize..4) {
            let heads: [&[u8]; 4] = [
                &[0x1f, 0x8b, 8, 0], &[0x28, 0xb5, 0x2f, 0xfd],
                &[0xfd, b'7', b'z', b'X', b'Z', 0], &LZ4_LEGACY_MAGIC,
            ];
            let bytes = [heads[which], &noise].concat();
            let found = Compression::detect(&bytes).unwrap().unwrap();
            let _ = found.unpack(&bytes, 1 << 20);
        }
    }
}
