//! The archive of our own files that is appended to a distribution's initrd.
//!
//! ```text
//! rcr/rcr-early           the program
//! rcr/config.json         EarlyConfig
//! rcr/modules/001-dax.ko  modules of the new kernel, unpacked, in load order
//! conf/conf.d/zz-rcr      initramfs-tools: sourced by init
//! HOOKS/cmdline/zz-rcr.sh, HOOKS/pre-pivot/zz-rcr.sh     dracut
//! ```
//!
//! An entry for a directory that the initrd already has is never written: where
//! that one is a link (`lib`), the kernel would replace it by a directory.

mod hooks;

use std::io::{self, Write};

use cpio::NewcBuilder;

use crate::config::{EarlyConfig, ModuleFile};
use crate::initrd::{Initrd, Names};
use crate::modules::ModuleSet;

const MODE_DIRECTORY: u32 = 0o040_755;
const MODE_FILE: u32 = 0o100_644;
const MODE_PROGRAM: u32 = 0o100_755;

/// What goes into an overlay.
#[derive(Debug)]
pub struct OverlayInput<'a> {
    /// The static program `rcr-early`.
    pub program: &'a [u8],
    /// Modules of the new kernel.
    pub modules: &'a ModuleSet,
    /// Configuration; its list of modules is filled in here.
    pub config: EarlyConfig,
    /// Parameters for modules, by module name.
    pub module_options: std::collections::BTreeMap<String, String>,
}

/// Why an overlay cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The program would not run in an initramfs.
    #[error("the early-boot program is no static x86-64 ELF program")]
    Program,
    /// The archive format cannot hold a file this large.
    #[error("{name} is larger than an archive can hold: {bytes} bytes")]
    TooLarge {
        /// Name in the archive.
        name: String,
        /// Size in bytes.
        bytes: usize,
    },
    /// Writing into memory failed.
    #[error("{name} cannot be archived")]
    Write {
        /// Name in the archive.
        name: String,
        /// What the archiver said.
        source: io::Error,
    },
}

/// Makes the overlay for `initrd`.
pub fn build(initrd: &Initrd, input: &OverlayInput<'_>) -> Result<Vec<u8>, OverlayError> {
    if !is_static_elf(input.program) {
        return Err(OverlayError::Program);
    }
    let files = input.modules.files(&input.module_options);
    let config = EarlyConfig {
        modules: files.clone(),
        ..input.config.clone()
    };
    let config = serde_json::to_vec_pretty(&config).expect("plain data with string keys");
    let mut archive = Archive::new(initrd.names());
    archive.file("rcr/rcr-early", MODE_PROGRAM, input.program)?;
    archive.file("rcr/config.json", MODE_FILE, &config)?;
    for (ModuleFile { file, .. }, module) in files.iter().zip(input.modules.modules()) {
        archive.file(&format!("rcr/modules/{file}"), MODE_FILE, &module.bytes)?;
    }
    for hook in hooks::of(initrd.family()) {
        archive.file(&hook.path, MODE_FILE, hook.script.as_bytes())?;
    }
    archive.finish()
}

/// Whether `bytes` is an x86-64 ELF program without an interpreter.
fn is_static_elf(bytes: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    const EM_X86_64: u16 = 62;
    let word = |at: usize| Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let headers = || {
        let start = u64::from_le_bytes(*bytes.get(0x20..)?.first_chunk()?);
        let (size, count) = (usize::from(word(0x36)?), usize::from(word(0x38)?));
        let table = bytes
            .get(usize::try_from(start).ok()?..)?
            .get(..size.checked_mul(count)?)?;
        (size >= 56).then(|| table.chunks_exact(size))
    };
    bytes.starts_with(b"\x7fELF\x02\x01")
        && word(0x12) == Some(EM_X86_64)
        && headers().is_some_and(|mut headers| {
            !headers.any(|header| header.starts_with(&PT_INTERP.to_le_bytes()))
        })
}

/// A `newc` archive in the making, which knows what is there already.
struct Archive<'n> {
    existing: &'n Names,
    written: Vec<String>,
    bytes: Vec<u8>,
}

impl<'n> Archive<'n> {
    fn new(existing: &'n Names) -> Self {
        Archive {
            existing,
            written: Vec::new(),
            bytes: Vec::new(),
        }
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), OverlayError> {
        for (at, _) in name.match_indices('/') {
            let dir = &name[..at];
            if !self.existing.contains(dir) && !self.written.iter().any(|w| w == dir) {
                self.entry(dir, MODE_DIRECTORY, &[])?;
            }
        }
        self.entry(name, mode, content)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), OverlayError> {
        let bytes = u32::try_from(content.len()).map_err(|_| OverlayError::TooLarge {
            name: name.to_owned(),
            bytes: content.len(),
        })?;
        // The kernel takes equal inode numbers with more than one link for hard
        // links; each entry has its own number and one link.
        let ino = self.written.len() as u32 + 1;
        let builder = NewcBuilder::new(name).mode(mode).ino(ino).nlink(1);
        let mut writer = builder.write(&mut self.bytes, bytes);
        writer
            .write_all(content)
            .and_then(|()| writer.finish().map(drop))
            .map_err(|source| OverlayError::Write {
                name: name.to_owned(),
                source,
            })?;
        self.written.push(name.to_owned());
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>, OverlayError> {
        cpio::newc::trailer(&mut self.bytes).map_err(|source| OverlayError::Write {
            name: "TRAILER!!!".into(),
            source,
        })?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use super::*;

    fn initrd(names: &[&str]) -> Initrd {
        let mut bytes = Vec::new();
        for name in names {
            let writer = NewcBuilder::new(name)
                .mode(MODE_DIRECTORY)
                .write(&mut bytes, 0);
            writer.finish().unwrap();
        }
        cpio::newc::trailer(&mut bytes).unwrap();
        Initrd::parse(Path::new("x"), bytes).unwrap()
    }

    fn elf(interpreter: bool) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[0x12] = 62;
        bytes[0x20] = 64;
        bytes[0x36] = 56;
        bytes[0x38] = 1;
        bytes[64] = if interpreter { 3 } else { 1 };
        bytes
    }

    fn entries(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut out = Vec::new();
        loop {
            let mut reader = cpio::NewcReader::new(bytes).unwrap();
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            if reader.entry().is_trailer() {
                return out;
            }
            let mut content = Vec::new();
            io::Read::read_to_end(&mut reader, &mut content).unwrap();
            bytes = reader.finish().unwrap();
            out.push((name, mode, content));
        }
    }

    fn input<'a>(program: &'a [u8], modules: &'a ModuleSet) -> OverlayInput<'a> {
        let config = EarlyConfig {
            pid_base: 300_000,
            ..Default::default()
        };
        OverlayInput {
            program,
            modules,
            config,
            module_options: BTreeMap::new(),
        }
    }

    #[test]
    fn only_directories_of_ours_are_made() {
        let initrd = initrd(&["conf", "conf/arch.conf", "conf/conf.d", "scripts/functions"]);
        let program = elf(false);
        let overlay = build(&initrd, &input(&program, &ModuleSet::default())).unwrap();
        let entries = entries(&overlay);
        let names: Vec<_> = entries.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "rcr",
                "rcr/rcr-early",
                "rcr/config.json",
                "conf/conf.d/zz-rcr"
            ]
        );
        assert_eq!(entries[0].1, MODE_DIRECTORY);
        assert_eq!((entries[1].1, &entries[1].2), (MODE_PROGRAM, &program));
        let config: EarlyConfig = serde_json::from_slice(&entries[2].2).unwrap();
        assert_eq!(config.pid_base, 300_000);
        let combined = initrd.append(&overlay);
        let again = Initrd::parse(Path::new("x"), combined).unwrap();
        assert!(again.names().contains("rcr/rcr-early") && again.names().contains("conf"));
    }

    #[test]
    fn a_missing_hook_directory_is_made() {
        let initrd = initrd(&["conf/arch.conf", "scripts/functions", "conf"]);
        let program = elf(false);
        let overlay = build(&initrd, &input(&program, &ModuleSet::default())).unwrap();
        assert!(
            entries(&overlay)
                .iter()
                .any(|e| e.0 == "conf/conf.d" && e.1 == MODE_DIRECTORY)
        );
    }

    #[test]
    fn dracut_gets_its_hooks_where_it_looks() {
        let names = [
            "lib",
            "usr",
            "usr/lib",
            "usr/lib/dracut",
            "usr/lib/dracut/hooks",
            "usr/lib/dracut/hooks/cmdline",
            "usr/lib/dracut/hooks/pre-pivot",
        ];
        let program = elf(false);
        let overlay = build(&initrd(&names), &input(&program, &ModuleSet::default())).unwrap();
        let entries = entries(&overlay);
        assert!(
            entries
                .iter()
                .any(|e| e.0 == "usr/lib/dracut/hooks/cmdline/zz-rcr.sh")
        );
        assert!(
            entries
                .iter()
                .any(|e| e.0 == "usr/lib/dracut/hooks/pre-pivot/zz-rcr.sh")
        );
        assert!(
            entries
                .iter()
                .all(|e| e.1 != MODE_DIRECTORY || e.0.starts_with("rcr"))
        );
    }

    #[test]
    fn a_program_that_needs_a_loader_is_refused() {
        let initrd = initrd(&["conf/arch.conf", "scripts/functions"]);
        for program in [
            elf(true),
            b"#!/bin/sh".to_vec(),
            elf(false)[..70].to_vec(),
            Vec::new(),
        ] {
            let error = build(&initrd, &input(&program, &ModuleSet::default())).unwrap_err();
            assert!(matches!(error, OverlayError::Program));
        }
    }

    proptest::proptest! {
        #[test]
        fn any_program_gives_an_answer(mut bytes: Vec<u8>, at in 0usize..120, value: u8) {
            is_static_elf(&bytes);
            bytes = elf(false);
            bytes[at] = value;
            is_static_elf(&bytes);
        }
    }
}
