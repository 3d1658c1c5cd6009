//! Kernels, initrds and what is in them, command lines.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use rcr_fuzz::text;
use rcr_initramfs::{Compression, Initrd};
use rcr_kexec::cmdline::{CommandLine, remembered_init};
use rcr_kexec::{BzImage, fuzzing};

fuzz_target!(init: rcr_fuzz::seeds::write_if_asked("boot"), |bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else {
        return;
    };
    match which % 5 {
        0 => {
            if let Ok(image) = BzImage::parse(bytes.to_vec()) {
                (image.release(), image.command_line_max());
            }
        }
        1 => {
            if let Ok(initrd) = Initrd::parse(Path::new("initrd"), bytes.to_vec()) {
                initrd.append(b"more");
            }
        }
        2 => {
            if let Ok(Some(found)) = Compression::detect(bytes) {
                let _ = found.unpack(bytes, 1 << 20);
            }
        }
        3 => rcr_initramfs::fuzzing::modules(bytes),
        _ => {
            let text = text(bytes);
            let line = CommandLine::reuse(&text);
            line.to_text(line.admin_init());
            remembered_init(&text);
            fuzzing::crash_kernel(&text);
        }
    }
});
