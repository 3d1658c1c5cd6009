//! What single options of the criu front do.

mod front;

use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use front::{
    Holder, Sleeper, becomes_stopped, command, criu, done, inherited_pipe, may_dump, text, until,
};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

#[test]
fn the_tree_is_left_stopped() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let holder = Holder::new(dir.path());
    let was = holder.asked();
    done(dir.path(), &format!("dump -t {} -s -D .", holder.pid()));
    becomes_stopped(holder.pid());
    kill(Pid::from_raw(holder.pid()), Signal::SIGKILL).unwrap();
    holder.ended();
    done(dir.path(), "restore -d -S -s");
    becomes_stopped(holder.pid());
    kill(Pid::from_raw(holder.pid()), Signal::SIGCONT).unwrap();
    assert_eq!(holder.asked(), was);
}

#[test]
fn a_byte_says_that_the_tree_runs() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let holder = Holder::new(dir.path());
    done(dir.path(), &format!("dump -t {}", holder.pid()));
    holder.ended();
    let (reader, writer, number) = inherited_pipe();
    done(dir.path(), &format!("restore -d -S --status-fd {number}"));
    drop(writer);
    // Whoever waits sees the end as well: nobody restored has the other end.
    let mut said = Vec::new();
    fs::File::from(reader).read_to_end(&mut said).unwrap();
    assert_eq!(said, [0]);
    holder.asked();
}

#[test]
fn a_script_that_fails_stops_what_is_done() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    let script = "echo $CRTOOLS_SCRIPT_ACTION $CRTOOLS_IMAGE_DIR >> stages\n\
                  [ $CRTOOLS_SCRIPT_ACTION != \"$(cat refused)\" ]\n";
    fs::write(at.join("script"), script).unwrap();
    fs::create_dir(at.join("images")).unwrap();
    let mut sleeper = Sleeper::new();
    let pid = sleeper.pid();
    let with = "-D images -W . --action-script ./script";
    let mut permissions = fs::metadata(at.join("script")).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
    fs::set_permissions(at.join("script"), permissions).unwrap();
    for stage in ["pre-dump", "post-dump"] {
        fs::write(at.join("refused"), stage).unwrap();
        let out = criu(at, &format!("dump -t {pid} {with}"));
        assert_eq!(out.status.code(), Some(1), "{stage}");
        assert!(text(&out.stderr).contains(stage), "{stage}: {out:?}");
        assert!(sleeper.sleeps(), "{stage}");
    }
    fs::write(at.join("refused"), "none").unwrap();
    done(at, &format!("dump -t {pid} {with}"));
    sleeper.0.wait().unwrap();
    for stage in [
        "pre-restore",
        "setup-namespaces",
        "post-restore",
        "pre-resume",
    ] {
        fs::write(at.join("refused"), stage).unwrap();
        let out = criu(at, &format!("restore -d {with} --pidfile pid"));
        assert_eq!(out.status.code(), Some(1), "{stage}");
        assert!(!at.join("pid").exists(), "{stage}");
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{stage}");
    }
    let stages = fs::read_to_string(at.join("stages")).unwrap();
    let images = at.join("images");
    let images = images.to_str().unwrap();
    assert!(stages.lines().all(|l| l.ends_with(images)), "{stages}");
}

#[test]
fn a_file_of_options_counts_as_if_they_were_given() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    fs::create_dir(at.join("images")).unwrap();
    fs::create_dir(at.join(".criu")).unwrap();
    fs::write(at.join(".criu/default.conf"), "images-dir nowhere\n").unwrap();
    let config = "images-dir images # here\nlog-file \"dump.log\"\nleave-running\nverbosity 4\n";
    fs::write(at.join("own.conf"), config).unwrap();
    let mut sleeper = Sleeper::new();
    let pid = sleeper.pid();
    done(at, &format!("dump -t {pid} --config own.conf"));
    assert!(sleeper.sleeps());
    assert!(at.join("images/dump.log").exists() && at.join("images/pstree.img").exists());
    // What the line says comes last.
    done(at, &format!("dump -t {pid} --config own.conf -o other.log"));
    assert!(at.join("images/other.log").exists());
    assert_eq!(
        criu(at, &format!("dump -t {pid} -R")).status.code(),
        Some(1)
    );
    done(at, &format!("dump -t {pid} -R --no-default-config"));
    assert!(at.join("pstree.img").exists() && sleeper.sleeps());
    let environment = command(at, &format!("dump -t {pid}"))
        .env("CRIU_CONFIG_FILE", at.join("own.conf"))
        .status();
    assert!(environment.unwrap().success() && sleeper.sleeps());
}

#[test]
fn processors_are_written_down_and_compared() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    done(at, "cpuinfo dump");
    for mode in ["", "=all", "=cpu", "=ins,fpu"] {
        done(at, &format!("cpuinfo check --cpu-cap{mode}"));
    }
    // One more feature word than any processor has: all of its bits.
    let mut bytes = fs::read(at.join("cpuinfo.img")).unwrap();
    let good = bytes.clone();
    let last = bytes.len() - 1;
    bytes.truncate(last);
    fs::write(at.join("cpuinfo.img"), &bytes).unwrap();
    assert_eq!(criu(at, "cpuinfo check").status.code(), Some(1));
    let unknown = criu(at, "cpuinfo check --cpu-cap=nonsense");
    assert!(text(&unknown.stderr).contains("nonsense"), "{unknown:?}");
    if !may_dump() {
        return;
    }
    let mut sleeper = Sleeper::new();
    fs::write(at.join("cpuinfo.img"), b"").unwrap();
    done(at, &format!("dump -t {} -R --cpu-cap", sleeper.pid()));
    assert_eq!(fs::read(at.join("cpuinfo.img")).unwrap(), good);
    done(at, &format!("dump -t {}", sleeper.pid()));
    sleeper.0.wait().unwrap();
    fs::write(at.join("cpuinfo.img"), &bytes).unwrap();
    let out = criu(at, "restore -d --cpu-cap=ins");
    assert!(text(&out.stderr).contains("cpuinfo.img"), "{out:?}");
    assert_eq!(out.status.code(), Some(1));
}

#[test]
fn a_tree_that_does_not_stop_in_time_runs_on() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // It waits in vfork(2) for a child that does not execute anything.
    let mut stuck = front::vforker(dir.path());
    until("vfork", || front::state(stuck.id() as i32) == 'D');
    let line = format!("dump -t {} --timeout 1 -o log -v4", stuck.id());
    let out = criu(dir.path(), &line);
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    let log = fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(log.contains("Dumping FAILED."), "{log}");
    assert_eq!(front::state(stuck.id() as i32), 'D');
    assert_eq!(front::tracer(stuck.id() as i32), 0);
    front::end_tree(stuck.id() as i32);
    stuck.wait().unwrap();
}

#[test]
fn a_frozen_cgroup_stays_as_it_was() {
    let Some(group) = front::Cgroup::make("rcr-front-frozen").filter(|_| may_dump()) else {
        eprintln!("no control groups to be had here");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut sleeper = Sleeper::new();
    group.take(sleeper.pid());
    group.freeze(true);
    let line = format!(
        "dump -t {} -R --freeze-cgroup {}",
        sleeper.pid(),
        group.path()
    );
    done(dir.path(), &line);
    assert!(group.is_frozen() && sleeper.sleeps());
    group.freeze(false);
    done(dir.path(), &line);
    assert!(!group.is_frozen() && sleeper.sleeps());
}

#[test]
fn a_restore_ends_as_what_it_restored() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let sleeper = Sleeper::new();
    let pid = Pid::from_raw(sleeper.pid() as i32);
    done(dir.path(), &format!("dump -t {pid} -R"));
    drop(sleeper);
    let mut front = command(dir.path(), "restore --pidfile pid")
        .spawn()
        .unwrap();
    until("the pid file", || dir.path().join("pid").exists());
    until("its sleep", || front::state(pid.as_raw()) == 'S');
    kill(pid, Signal::SIGKILL).unwrap();
    let status = front.wait().unwrap();
    assert_eq!((status.code(), status.signal()), (Some(137), None));
}

#[test]
fn what_stands_in_the_place_of_criu_is_waited_for() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let holder = Holder::new(dir.path());
    let was = holder.asked();
    // Locks, removed files and the rest come along without being asked for.
    let line = "--file-locks --link-remap --ghost-limit 1M --ext-unix-sk --skip-in-flight \
                --tcp-established --shell-job --manage-cgroups=ignore --network-lock nftables \
                --empty-ns net --log-pid --ghost-fiemap --force-irmap";
    done(dir.path(), &format!("dump -t {} {line}", holder.pid()));
    assert!(matches!(holder.ended(), WaitStatus::Signaled(..)));
    done(dir.path(), &format!("restore -d -S {line}"));
    assert_eq!(holder.asked(), was);
}
