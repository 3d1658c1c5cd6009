//! The early-boot program of the new kernel: numbers processes, loads modules,
//! restores the services that the old kernel handed over, and hands over to the
//! distribution's init whatever happens.
//!
//! ```text
//! initramfs   rcr-early early     first hook: process ids, modules, the store's device
//!             rcr-early stage     last hook: the program moves to /run/rcr/boot
//! real root   /run/rcr/boot/init  as PID 1: worker restores, then exec of the real init
//! ```

mod boot;
mod early;
mod kmsg;
mod landmarks;
mod pid1;
mod progress;
mod stage;
mod sys;
mod worker;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args_os()
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
    let name = args
        .first()
        .and_then(|arg| Path::new(arg).file_name())
        .unwrap_or_default();
    if std::process::id() == 1 || name == "init" {
        pid1::run();
    }
    let words: Vec<&str> = args.iter().skip(1).map(String::as_str).collect();
    let done = match words.as_slice() {
        ["early"] => early::run(),
        ["stage"] => stage::run(None),
        ["stage", root] => stage::run(Some(Path::new(root))),
        ["--version"] => {
            println!("rcr-early {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        _ => {
            eprintln!("usage: rcr-early early | stage [NEWROOT] | --version");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            kmsg::warn(&format!("{}: {error:#}", words[0]));
            ExitCode::FAILURE
        }
    }
}
