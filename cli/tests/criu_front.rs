//! The criu front's exit codes and messages, and what a failure leaves behind.

mod front;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use front::{Sleeper, criu, text};

#[test]
fn bad_lines_and_missing_things_exit_above_zero() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("dump --nonsense", "unknown option --nonsense"),
        ("frobnicate", "unknown command: frobnicate"),
        ("dump -t", "needs a value"),
        ("dump -t 12x", "is no number"),
        ("dump -D nowhere -t 1", "can't open dir nowhere"),
        ("restore -D nowhere", "can't open dir nowhere"),
        ("dump", "option --tree PID is missing"),
        ("dump -t 4194303", "there is no process 4194303"),
        ("restore -S", "--restore-sibling needs --restore-detached"),
        ("restore -d", "image inventory.img is missing"),
        ("exec", "the command exec is not offered"),
        ("lazy-pages -D nowhere", "can't open dir nowhere"),
        ("lazy-pages --page-server", "--port is missing"),
        ("pre-dump", "option --tree PID is missing"),
        ("pre-dump -t 4194303", "there is no process 4194303"),
        (
            "dump -t 1 --prev-images-dir nowhere",
            "--prev-images-dir nowhere",
        ),
        ("swrk 99", "swrk: 99 is not open"),
        ("check --feature nonsense", "unknown feature: nonsense"),
    ];
    for (line, told) in cases {
        let out = criu(dir.path(), line);
        assert_eq!(out.status.code(), Some(1), "{line}");
        let said = text(&out.stderr);
        assert!(said.contains(told), "{line}: {said}");
    }
}

#[test]
fn it_says_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let out = criu(dir.path(), "--version");
    assert!(out.status.success());
    assert!(text(&out.stdout).starts_with("Version: 4."), "{out:?}");
    assert!(criu(dir.path(), "check --feature list").status.success());
    assert!(criu(dir.path(), "check --feature timerfd").status.success());
    // The name alone is enough.
    let named = dir.path().join("criu");
    symlink(env!("CARGO_BIN_EXE_rcr"), &named).unwrap();
    let out = Command::new(&named).arg("-V").output().unwrap();
    assert!(text(&out.stdout).starts_with("Version: 4."), "{out:?}");
}

#[test]
fn a_failed_dump_leaves_a_log_and_the_tree_running() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("work")).unwrap();
    let mut sleeper = Sleeper::new();
    let pid = sleeper.pid();
    for option in [
        "--stream",
        "--join-ns net:/x",
        "--page-server",
        "--lazy-pages --leave-running",
        "--action-script false",
    ] {
        let line = format!("dump -t {pid} -W work -v4 -o dump.log {option}");
        assert_eq!(criu(dir.path(), &line).status.code(), Some(1), "{option}");
        let log = fs::read_to_string(dir.path().join("work/dump.log")).unwrap();
        assert!(log.contains("Dumping FAILED."), "{log}");
        assert!(log.lines().all(|l| l.starts_with("(0")), "{log}");
        let word = option.split(' ').next().unwrap().trim_start_matches('-');
        assert!(log.contains(word), "{option}: {log}");
        assert!(sleeper.sleeps(), "{option}");
    }
    let images = fs::read_dir(dir.path()).unwrap().filter(|e| {
        let name = e.as_ref().unwrap().file_name();
        name.to_string_lossy().contains(".img")
    });
    assert_eq!(images.count(), 0);
    // Asked for nothing, it says nothing; the log is there nevertheless.
    let quiet = criu(
        dir.path(),
        &format!("dump -t {pid} -verbosity=0 -o q.log --tls"),
    );
    assert_eq!(
        (quiet.status.code(), text(&quiet.stderr)),
        (Some(1), String::new())
    );
    assert_eq!(fs::read_to_string(dir.path().join("q.log")).unwrap(), "");
}

#[test]
fn a_tree_goes_there_and_back_with_scripts_and_files() {
    // SAFETY: asks for a number.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("not as this user: dumping needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script");
    fs::write(
        &script,
        "echo $CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID >> stages",
    )
    .unwrap();
    fs::create_dir(dir.path().join(".criu")).unwrap();
    fs::write(
        dir.path().join(".criu/default.conf"),
        "action-script \"sh script\"\nverbosity 4\n",
    )
    .unwrap();
    let mut sleeper = Sleeper::new();
    let pid = sleeper.pid();
    let out = criu(dir.path(), &format!("dump -t {pid} -R -o dump.log"));
    let log = fs::read_to_string(dir.path().join("dump.log")).unwrap();
    assert!(out.status.success() && sleeper.sleeps(), "{log}");
    assert!(log.contains("Dumping finished successfully"), "{log}");
    // Over the images of before, and gone this time.
    let out = criu(dir.path(), &format!("dump -t {pid} -o dump.log"));
    assert!(out.status.success());
    assert!(!sleeper.0.wait().unwrap().success());
    assert!(dir.path().join("stats-dump").exists());
    let line = "restore -d -S --pidfile pid -o restore.log";
    let out = criu(dir.path(), line);
    let log = fs::read_to_string(dir.path().join("restore.log")).unwrap();
    assert!(out.status.success(), "{log}");
    assert!(
        log.contains("Restore finished successfully. Tasks resumed."),
        "{log}"
    );
    assert_eq!(
        fs::read_to_string(dir.path().join("pid")).unwrap(),
        pid.to_string()
    );
    let stages = fs::read_to_string(dir.path().join("stages")).unwrap();
    let want = format!(
        "pre-dump {pid}\npost-dump {pid}\npre-dump {pid}\npost-dump {pid}\npre-restore\n\
         setup-namespaces {pid}\npost-setup-namespaces {pid}\npost-restore {pid}\n\
         pre-resume {pid}\npost-resume {pid}\n"
    );
    let stages: String = stages.lines().map(|l| format!("{}\n", l.trim())).collect();
    assert_eq!(stages, want);
    let target = nix::unistd::Pid::from_raw(pid as i32);
    nix::sys::signal::kill(target, nix::sys::signal::Signal::SIGKILL).unwrap();
    // Our child, for it was made a sibling of the program we started.
    nix::sys::wait::waitpid(target, None).unwrap();
    // A pid file is never written over, and what was made goes away again.
    let out = criu(dir.path(), line);
    assert_eq!(out.status.code(), Some(1));
    let left = nix::sys::wait::waitpid(target, None).unwrap();
    assert!(
        matches!(left, nix::sys::wait::WaitStatus::Signaled(..)),
        "{left:?}"
    );
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}
