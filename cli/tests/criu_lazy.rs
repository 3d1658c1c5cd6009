//! Trees that run before their memory is there.

mod front;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command};

use front::{Holder, command, criu, done, inherited_pipe, may_dump, text, until};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

/// A command that says when it is ready.
fn ready(mut command: Command) -> Child {
    let (reader, writer, number) = inherited_pipe();
    command.args(["--status-fd", &number.to_string()]);
    let child = command.spawn().unwrap();
    drop(writer);
    let mut said = [1];
    nix::unistd::read(&reader, &mut said).unwrap();
    assert_eq!(said, [0], "{command:?}");
    child
}

fn lacks_userfaultfd() -> bool {
    let lacks = !Path::new("/dev/userfaultfd").exists();
    if lacks {
        eprintln!("this kernel has no /dev/userfaultfd");
    }
    lacks
}

#[test]
fn pages_come_from_a_daemon() {
    if !may_dump() || lacks_userfaultfd() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("images")).unwrap();
    let holder = Holder::new(dir.path());
    let was = holder.asked();
    done(dir.path(), &format!("dump -t {} -D images", holder.pid()));
    holder.ended();
    let mut daemon = ready(command(
        dir.path(),
        "lazy-pages -D images -W . -o lazy.log -v4",
    ));
    done(dir.path(), "restore -d -S -D images -W . --lazy-pages");
    assert_eq!(holder.asked(), was);
    assert!(daemon.wait().unwrap().success());
    assert!(!dir.path().join("lazy-pages.socket").exists());
    let log = fs::read_to_string(dir.path().join("lazy.log")).unwrap();
    assert!(log.contains("all memory is filled"), "{log}");
    // It is as whole as any other.
    done(dir.path(), &format!("dump -t {} -D images", holder.pid()));
    holder.ended();
    // Without a daemon a process of ours does it.
    done(dir.path(), "restore -d -S -D images --lazy-pages");
    assert_eq!(holder.asked(), was);
}

/// Dumps lazily, and restores with pages that come from there.
fn journey(cut: bool) {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("images")).unwrap();
    let holder = Holder::new(dir.path());
    let was = holder.asked();
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let net = format!("--address 127.0.0.1 --port {port}");
    let line = format!(
        "dump -t {} -D images --lazy-pages {net} -o dump.log -v4",
        holder.pid()
    );
    let mut dump = ready(command(dir.path(), &line));
    // What is large is not in the images.
    let pages: u64 = fs::read_dir(dir.path().join("images"))
        .unwrap()
        .map(|e| e.unwrap())
        .filter(|e| e.file_name().to_string_lossy().starts_with("pages-"))
        .map(|e| e.metadata().unwrap().len())
        .sum();
    assert!(pages < 8 << 20, "{pages} bytes of pages are written");
    let out = criu(dir.path(), "restore -d -D images");
    assert!(text(&out.stderr).contains("lazy dump"), "{out:?}");
    if cut {
        // Nobody has got anything yet: it goes on where it was.
        drop(std::net::TcpStream::connect(("127.0.0.1", port)).unwrap());
        assert!(!dump.wait().unwrap().success());
        assert_eq!(holder.asked(), was);
        return;
    }
    // Two processes of one id cannot be at one time in one place.
    let mut elsewhere = Command::new("unshare");
    elsewhere.args([
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
        "bash",
        "-c",
    ]);
    let ours = env!("CARGO_BIN_EXE_rcr");
    let script = format!(
        "echo $$ > outer; \"{ours}\" criu lazy-pages -D images -W . --page-server {net} \
         --status-fd 9 -o lazy.log -v4 9> ready & lazy=$!; \
         while [ ! -s ready ]; do sleep 0.01; done; \
         \"{ours}\" criu restore -d -D images -W . --lazy-pages -o restore.log -v4 || exit 1; \
         kill -USR1 {pid}; wait $lazy || exit 2; \
         while read n rest < told && [ $n -le {asked} ]; do sleep 0.01; done; \
         cat told; kill -KILL {pid}",
        pid = holder.pid(),
        asked = 1,
    );
    let out = elsewhere
        .arg(script)
        .current_dir(dir.path())
        .output()
        .unwrap();
    let logs = ["lazy.log", "restore.log"].map(|n| fs::read_to_string(dir.path().join(n)));
    assert!(out.status.success(), "{out:?} {logs:?}");
    let (_, said) = text(&out.stdout)
        .trim()
        .split_once(' ')
        .map(|(a, b)| (a.to_owned(), b.to_owned()))
        .unwrap();
    assert_eq!(said, was);
    assert!(dump.wait().unwrap().success());
    assert!(matches!(holder.ended(), WaitStatus::Signaled(..)));
}

#[test]
fn pages_come_from_where_it_was_dumped() {
    if may_dump() && !lacks_userfaultfd() {
        journey(false);
    }
}

#[test]
fn a_lazy_dump_that_nobody_takes_leaves_the_tree_running() {
    if may_dump() {
        journey(true);
    }
}

#[test]
fn a_tree_joins_namespaces() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let holder = Holder::new(dir.path());
    let was = holder.asked();
    done(dir.path(), &format!("dump -t {}", holder.pid()));
    holder.ended();
    let mut host = Command::new("unshare");
    host.args(["--net", "--uts", "--ipc", "sleep", "1000"]);
    let mut host = host.spawn().unwrap();
    let comm = format!("/proc/{}/comm", host.id());
    until("the namespaces", || {
        fs::read_to_string(&comm).unwrap().trim() == "sleep"
    });
    let ns = |pid: u32, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    let line = format!(
        "restore -d -S --join-ns net:/proc/{0}/ns/net --join-ns uts:{0} --join-ns ipc:{0}",
        host.id()
    );
    done(dir.path(), &line);
    assert_eq!(holder.asked(), was);
    for kind in ["net", "uts", "ipc"] {
        assert_eq!(ns(holder.pid() as u32, kind), ns(host.id(), kind), "{kind}");
        assert_ne!(ns(host.id(), kind), ns(std::process::id(), kind), "{kind}");
    }
    kill(Pid::from_raw(holder.pid()), Signal::SIGKILL).unwrap();
    holder.ended();
    let out = criu(dir.path(), "restore -d --join-ns net:/nowhere");
    assert!(
        text(&out.stderr).contains("--join-ns net:/nowhere"),
        "{out:?}"
    );
    host.kill().unwrap();
    host.wait().unwrap();
}
