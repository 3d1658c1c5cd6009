//! The header of a kernel image (Documentation/arch/x86/boot.rst).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Offsets in the image, which are those in `struct boot_params` as well.
pub(crate) mod header {
    pub const SETUP_SECTS: usize = 0x1f1;
    pub const BOOT_FLAG: usize = 0x1fe;
    /// How far the header reaches beyond 0x202, in one byte.
    pub const JUMP_LEN: usize = 0x201;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const KERNEL_VERSION: usize = 0x20e;
    pub const KERNEL_ALIGNMENT: usize = 0x230;
    pub const RELOCATABLE: usize = 0x234;
    pub const XLOADFLAGS: usize = 0x236;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const PREF_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
    pub const END: usize = 0x264;
}

/// Protocol 2.12 brought `xloadflags`.
const VERSION_MIN: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1 << 0;
const XLF_ABOVE_4G: u16 = 1 << 1;
const SECTOR: usize = 512;
/// `kernel_version` counts from here.
const SETUP_START: usize = 0x200;
/// The 64-bit entry point is this far into the loaded kernel.
const ENTRY_64: u64 = 0x200;
/// No kernel image comes near this.
const FILE_LEN_MAX: u64 = 1 << 30;

/// A kernel image that can be started in 64-bit mode.
#[derive(Debug, Clone)]
pub struct BzImage {
    bytes: Vec<u8>,
    release: String,
    payload_at: usize,
}

/// Why a file is not a kernel that we can load.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No such file.
    #[error("there is no kernel image {path}")]
    NotFound {
        /// The path.
        path: PathBuf,
    },
    /// The file cannot be read.
    #[error("reading the kernel image {path}")]
    Read {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is something else.
    #[error("not a bzImage: {hint}")]
    NotBzImage {
        /// What it looks like, or what to give instead.
        hint: &'static str,
    },
    /// The boot protocol is older than what we need.
    #[error(
        "the kernel speaks boot protocol {major}.{minor:02}; 2.12 (Linux 3.8) or later is needed"
    )]
    TooOld {
        /// Major number.
        major: u8,
        /// Minor number.
        minor: u8,
    },
    /// It has no 64-bit entry point.
    #[error("the kernel has no 64-bit entry point: it is a 32-bit kernel")]
    Not64Bit,
    /// The image ends before its header says so.
    #[error("the kernel image is cut off: {what}")]
    Truncated {
        /// What is missing.
        what: &'static str,
    },
    /// A field has a value that no kernel has.
    #[error("the kernel image's header is damaged: {what}")]
    Damaged {
        /// Which.
        what: &'static str,
    },
}

impl BzImage {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// Every [`ImageError`].
    pub fn read(path: &Path) -> Result<BzImage, ImageError> {
        let read = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => ImageError::NotFound {
                path: path.to_owned(),
            },
            _ => ImageError::Read {
                path: path.to_owned(),
                source,
            },
        };
        let meta = fs::metadata(path).map_err(read)?;
        if !meta.is_file() {
            return Err(ImageError::NotBzImage {
                hint: "it is not a file",
            });
        }
        if meta.len() > FILE_LEN_MAX {
            return Err(ImageError::NotBzImage {
                hint: "it is too large for a kernel",
            });
        }
        BzImage::parse(fs::read(path).map_err(read)?)
    }

    /// Checks an image's bytes.
    ///
    /// # Errors
    /// Every [`ImageError`] but `NotFound` and `Read`.
    pub fn parse(bytes: Vec<u8>) -> Result<BzImage, ImageError> {
        if bytes.len() < header::END
            || u16_at(&bytes, header::BOOT_FLAG) != 0xaa55
            || bytes[header::MAGIC..header::MAGIC + 4] != *b"HdrS"
        {
            return Err(ImageError::NotBzImage { hint: hint(&bytes) });
        }
        let version = u16_at(&bytes, header::VERSION);
        if version < VERSION_MIN {
            let [minor, major] = version.to_le_bytes();
            return Err(ImageError::TooOld { major, minor });
        }
        if u16_at(&bytes, header::XLOADFLAGS) & XLF_KERNEL_64 == 0 {
            return Err(ImageError::Not64Bit);
        }
        let sectors = match bytes[header::SETUP_SECTS] {
            0 => 4,
            sectors => usize::from(sectors),
        };
        let payload_at = (sectors + 1) * SECTOR;
        if bytes.len() <= payload_at + ENTRY_64 as usize {
            return Err(ImageError::Truncated {
                what: "no kernel follows the setup sectors",
            });
        }
        let mut image = BzImage {
            bytes,
            release: String::new(),
            payload_at,
        };
        if !image.alignment().is_power_of_two() || image.alignment() > 1 << 30 {
            return Err(ImageError::Damaged {
                what: "kernel_alignment",
            });
        }
        if image.init_size() < image.payload().len() as u64 {
            return Err(ImageError::Damaged { what: "init_size" });
        }
        if image.pref_address() >= 1 << 46 {
            return Err(ImageError::Damaged {
                what: "pref_address",
            });
        }
        image.release = image.find_release()?;
        Ok(image)
    }

    /// What `uname -r` will say, for instance `6.12.57+deb13-amd64`.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Longest command line in bytes.
    pub fn command_line_max(&self) -> usize {
        self.u32(header::CMDLINE_SIZE) as usize
    }

    /// The part that is put into memory.
    pub(crate) fn payload(&self) -> &[u8] {
        &self.bytes[self.payload_at..]
    }

    /// The setup header, from [`header::SETUP_SECTS`] on.
    pub(crate) fn setup_header(&self) -> &[u8] {
        let end = header::MAGIC + usize::from(self.bytes[header::JUMP_LEN]);
        &self.bytes[header::SETUP_SECTS..end.max(header::END).min(self.bytes.len())]
    }

    /// Bytes that the kernel needs at its load address before it knows its memory.
    pub(crate) fn init_size(&self) -> u64 {
        u64::from(self.u32(header::INIT_SIZE))
    }

    pub(crate) fn alignment(&self) -> u64 {
        u64::from(self.u32(header::KERNEL_ALIGNMENT))
    }

    pub(crate) fn pref_address(&self) -> u64 {
        let bytes = &self.bytes[header::PREF_ADDRESS..header::PREF_ADDRESS + 8];
        u64::from_le_bytes(bytes.try_into().expect("eight bytes were sliced"))
    }

    pub(crate) fn is_relocatable(&self) -> bool {
        self.bytes[header::RELOCATABLE] != 0
    }

    pub(crate) fn may_lie_above_4g(&self) -> bool {
        u16_at(&self.bytes, header::XLOADFLAGS) & XLF_ABOVE_4G != 0
    }

    /// Where the processor starts for a kernel loaded at `load_address`.
    pub(crate) fn entry(load_address: u64) -> u64 {
        load_address + ENTRY_64
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(
            self.bytes[at..at + 4]
                .try_into()
                .expect("four bytes were sliced"),
        )
    }

    fn find_release(&self) -> Result<String, ImageError> {
        let damaged = ImageError::Damaged {
            what: "kernel_version",
        };
        let at = usize::from(u16_at(&self.bytes, header::KERNEL_VERSION)) + SETUP_START;
        let text = self.bytes[..self.payload_at].get(at..).unwrap_or_default();
        let release = text
            .split(|b| matches!(b, 0 | b' '))
            .next()
            .unwrap_or_default();
        // It becomes part of file names.
        if at == SETUP_START || release.is_empty() || !release.iter().all(u8::is_ascii_graphic) {
            return Err(damaged);
        }
        match String::from_utf8(release.to_vec()) {
            Ok(release) if !release.contains('/') => Ok(release),
            _ => Err(damaged),
        }
    }
}

fn hint(bytes: &[u8]) -> &'static str {
    match bytes {
        [0x7f, b'E', b'L', b'F', ..] => "it is an ELF file; give the vmlinuz, not the vmlinux",
        [0x1f, 0x8b, ..] => "it is a gzip file",
        [b'M', b'Z', ..] => "it is an EFI program without a kernel header (a unified image?)",
        [] => "it is empty",
        _ => "it has no kernel header",
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The least that passes as a kernel.
    pub(crate) fn sample() -> Vec<u8> {
        let mut bytes = vec![0u8; 5 * SECTOR + 8192];
        bytes[header::SETUP_SECTS] = 4;
        bytes[header::BOOT_FLAG..header::BOOT_FLAG + 2].copy_from_slice(&[0x55, 0xaa]);
        bytes[header::JUMP_LEN] = 0x6a;
        bytes[header::MAGIC..header::MAGIC + 4].copy_from_slice(b"HdrS");
        bytes[header::VERSION..header::VERSION + 2].copy_from_slice(&0x20fu16.to_le_bytes());
        bytes[header::KERNEL_VERSION] = 0x80;
        bytes[SETUP_START + 0x80..][..22].copy_from_slice(b"6.12.57+deb13-amd64 (x");
        bytes[header::KERNEL_ALIGNMENT..][..4].copy_from_slice(&(2u32 << 20).to_le_bytes());
        bytes[header::RELOCATABLE] = 1;
        bytes[header::XLOADFLAGS] = 3;
        bytes[header::CMDLINE_SIZE..][..4].copy_from_slice(&2047u32.to_le_bytes());
        bytes[header::PREF_ADDRESS..][..8].copy_from_slice(&(16u64 << 20).to_le_bytes());
        bytes[header::INIT_SIZE..][..4].copy_from_slice(&(64u32 << 20).to_le_bytes());
        bytes
    }

    #[test]
    fn the_release_is_read_from_the_header() {
        let image = BzImage::parse(sample()).unwrap();
        assert_eq!(image.release(), "6.12.57+deb13-amd64");
        assert_eq!(image.command_line_max(), 2047);
        assert_eq!(image.setup_header().len(), 0x26c - 0x1f1);
    }

    #[test]
    fn each_fault_has_its_own_error() {
        let with = |at: usize, byte: u8| {
            let mut bytes = sample();
            bytes[at] = byte;
            BzImage::parse(bytes).unwrap_err()
        };
        assert!(matches!(
            with(header::MAGIC, 0),
            ImageError::NotBzImage { .. }
        ));
        assert!(matches!(
            with(header::VERSION, 8),
            ImageError::TooOld { major: 2, minor: 8 }
        ));
        assert!(matches!(with(header::XLOADFLAGS, 2), ImageError::Not64Bit));
        assert!(matches!(
            with(header::SETUP_SECTS, 200),
            ImageError::Truncated { .. }
        ));
        assert!(matches!(
            with(header::KERNEL_ALIGNMENT, 3),
            ImageError::Damaged { .. }
        ));
        assert!(matches!(
            with(header::KERNEL_VERSION, 0),
            ImageError::Damaged { .. }
        ));
        let elf = BzImage::parse(b"\x7fELF".to_vec()).unwrap_err();
        assert!(elf.to_string().contains("vmlinuz"));
        let missing = BzImage::read(Path::new("/nonexistent/vmlinuz")).unwrap_err();
        assert!(matches!(missing, ImageError::NotFound { .. }));
        assert!(matches!(
            BzImage::read(Path::new("/")),
            Err(ImageError::NotBzImage { .. })
        ));
    }

    proptest! {
        #[test]
        fn no_header_makes_the_parser_panic(
            changes in proptest::collection::vec((0x1f1usize..0x300, any::<u8>()), 0..20),
            len in 0usize..20_000,
        ) {
            let mut bytes = sample();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            bytes.truncate(len);
            if let Ok(image) = BzImage::parse(bytes) {
                let _ = (image.payload(), image.setup_header(), image.release());
            }
        }
    }
}
