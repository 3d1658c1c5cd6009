//! Saves a task's namespaces, builds them again on the same host and shows
//! what differs: `namespaces PID [DIRECTORY]`.
//!
//! The task goes on undisturbed. Ends with 1 if anything is refused or differs.

use std::path::PathBuf;
use std::process::ExitCode;

use nix::unistd::Pid;
use rcr_engine::image::{DirSink, DirSource};
use rcr_engine::namespace::mnt::compare::normalised;
use rcr_engine::namespace::{self, HostEnv, MountPolicy, MountView, NsIds, NsKind};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<ExitCode> {
    let mut args = std::env::args().skip(1);
    let pid = Pid::from_raw(args.next().ok_or("usage: namespaces PID [DIRECTORY]")?.parse()?);
    let dir = args.next().map_or_else(|| std::env::temp_dir().join("namespaces"), PathBuf::from);
    std::fs::create_dir_all(&dir)?;
    let (host, task) = (NsIds::own()?, NsIds::of(pid)?);
    let own = |kind| !task.same(&host, kind);
    let policy = MountPolicy::default();

    let mut refused = namespace::check_namespaces(pid)?;
    refused.extend(namespace::check_mounts(pid, &policy)?);
    for r in &refused {
        println!("refused: {r}");
    }
    if !refused.is_empty() {
        return Ok(ExitCode::FAILURE);
    }
    println!("about {} bytes", namespace::estimate_mounts(pid, &policy)?);

    let mut sink = DirSink::new(&dir)?;
    namespace::save_host(&policy, &mut sink)?;
    namespace::save_mounts(pid, 1, &policy, &mut sink)?;
    namespace::save_uts(pid, 2, &mut sink)?;
    if own(NsKind::User) {
        namespace::save_user(pid, 3, &mut sink)?;
    }
    drop(sink);

    let images = DirSource::open(&dir)?;
    for (path, error) in namespace::prepare_host(&images)? {
        println!("host: {}: {error}", path.display());
    }
    let boot = HostEnv::current()?;
    let made = namespace::build_mounts(&images, 1, &boot)?;
    namespace::restore_uts(&images, 2)?;
    if own(NsKind::User) {
        namespace::build_user(&images, 3)?;
    }
    let before = normalised(&MountView::of(pid)?.mounts, &boot.boot_id);
    let made = MountView::at(made.ns().try_clone_to_owned()?)?;
    let after = normalised(&made.mounts, &boot.boot_id);
    Ok(compare(&before, &after))
}

fn compare(before: &[String], after: &[String]) -> ExitCode {
    let mut same = before.len() == after.len();
    for i in 0..before.len().max(after.len()) {
        let (b, a) = (before.get(i), after.get(i));
        if a == b {
            println!("  {}", a.map_or("", String::as_str));
        } else {
            same = false;
            println!("- {}\n+ {}", b.map_or("", String::as_str), a.map_or("", String::as_str));
        }
    }
    println!("{} mounts before, {} after: {}", before.len(), after.len(), if same { "same" } else { "different" });
    if same { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
