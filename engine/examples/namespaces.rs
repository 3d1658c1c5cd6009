//! Saves a task's namespaces and builds them again, here or on another host.
//!
//! ```text
//! namespaces save PID DIRECTORY [PATH...]   paths are carried with their content
//! namespaces build DIRECTORY                shows what differs from the saved one
//! ```
//! The task goes on undisturbed. Ends with 1 if anything is refused or differs.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::unistd::Pid;
use rcr_engine::content;
use rcr_engine::image::{DirSink, DirSource};
use rcr_engine::namespace::mnt::compare::normalised;
use rcr_engine::namespace::{self, HostEnv, MountPolicy, MountView, NsIds, NsKind};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["save", pid, dir, ref paths @ ..] => {
            save(Pid::from_raw(pid.parse()?), dir.as_ref(), paths)
        }
        ["build", dir] => build(dir.as_ref()),
        _ => Err("usage: namespaces save PID DIRECTORY [PATH...] | build DIRECTORY".into()),
    }
}

fn save(pid: Pid, dir: &Path, paths: &[&str]) -> Result<ExitCode> {
    let (host, task) = (NsIds::own()?, NsIds::of(pid)?);
    let policy = MountPolicy::default();
    let mut refused = namespace::check_namespaces(pid)?;
    refused.extend(namespace::check_mounts(pid, &policy, &Default::default())?);
    for r in &refused {
        println!("refused: {r}");
    }
    if !refused.is_empty() {
        return Ok(ExitCode::FAILURE);
    }
    println!("about {} bytes", namespace::estimate_mounts(pid, &policy)?);
    let mut sink = DirSink::create(dir)?;
    namespace::save_host(&policy, &mut sink)?;
    namespace::save_mounts(pid, 1, &policy, &Default::default(), &mut sink)?;
    namespace::save_uts(pid, 2, &mut sink)?;
    if !task.same(&host, NsKind::User) {
        namespace::save_user(pid, 3, &mut sink)?;
    }
    let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
    let root = std::fs::File::open("/")?;
    content::save_paths(
        std::os::fd::AsFd::as_fd(&root),
        &paths,
        "carried",
        &mut sink,
    )?;
    let lines = normalised(&MountView::of(pid)?.mounts, &HostEnv::current()?.boot_id);
    std::fs::write(dir.join("before.txt"), lines.join("\n"))?;
    Ok(ExitCode::SUCCESS)
}

fn build(dir: &Path) -> Result<ExitCode> {
    let before = std::fs::read_to_string(dir.join("before.txt"))?;
    let before: Vec<&str> = before.lines().collect();
    let images = DirSource::open(dir)?;
    for (path, error) in namespace::prepare_host(&images)? {
        println!("host: {}: {error}", path.display());
    }
    let root = std::fs::File::open("/")?;
    content::restore_paths(std::os::fd::AsFd::as_fd(&root), &images, "carried")?;
    let boot = HostEnv::current()?;
    let started = std::time::Instant::now();
    let made = namespace::build_mounts(&images, 1, &boot, &namespace::Beside::default())?;
    println!("built in {:?}", started.elapsed());
    namespace::restore_uts(&images, 2)?;
    if dir.join("userns-3.img").exists() {
        namespace::build_user(&images, 3)?;
    }
    let made = MountView::at(made.ns().try_clone_to_owned()?)?;
    Ok(compare(&before, &normalised(&made.mounts, &boot.boot_id)))
}

fn compare(before: &[&str], after: &[String]) -> ExitCode {
    let mut same = before.len() == after.len();
    for i in 0..before.len().max(after.len()) {
        let (b, a) = (before.get(i).copied(), after.get(i).map(String::as_str));
        if a != b {
            same = false;
            println!("- {}\n+ {}", b.unwrap_or_default(), a.unwrap_or_default());
        }
    }
    let verdict = if same { "same" } else { "different" };
    println!(
        "{} mounts before, {} after: {verdict}",
        before.len(),
        after.len()
    );
    if same {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
