//! Dumps whose pages go over the network.

mod front;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Child;

use front::{Holder, Sleeper, command, criu, done, inherited_pipe, may_dump, text};
use nix::sys::wait::WaitStatus;

/// A page server on a port of its own, that listens already.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn new(dir: &Path, line: &str) -> Self {
        // Free a moment ago; nobody else takes ports of the loopback by number.
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let (reader, writer, number) = inherited_pipe();
        let line =
            format!("page-server --address 127.0.0.1 --port {port} --status-fd {number} {line}");
        let child = command(dir, &line).spawn().unwrap();
        drop(writer);
        let mut ready = [1];
        nix::unistd::read(&reader, &mut ready).unwrap();
        assert_eq!(ready, [0]);
        Self { child, port }
    }

    fn ends_well(mut self) -> bool {
        self.child.wait().unwrap().success()
    }
}

#[test]
fn pages_go_to_a_server() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["here", "there"] {
        fs::create_dir(at(name)).unwrap();
    }
    let holder = Holder::new(dir.path());
    let was = holder.asked();
    let server = Server::new(dir.path(), "-D there -o server.log");
    let line = format!(
        "dump -t {} -D here --page-server --address 127.0.0.1 --port {}",
        holder.pid(),
        server.port
    );
    done(dir.path(), &line);
    assert!(matches!(holder.ended(), WaitStatus::Signaled(..)));
    assert!(server.ends_well());
    assert!(
        !at("here/pages-1.img").exists()
            && !at(&format!("here/pagemap-{}.img", holder.pid())).exists()
    );
    for entry in fs::read_dir(at("here")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), at("there").join(entry.file_name())).unwrap();
    }
    done(dir.path(), "restore -d -S -D there");
    assert_eq!(holder.asked(), was);
}

#[test]
fn generations_lie_with_the_server() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["here", "here/1", "here/2", "there", "there/1", "there/2"] {
        fs::create_dir(at(name)).unwrap();
    }
    let holder = Holder::new(dir.path());
    let to = |server: &Server| format!("--page-server --address 127.0.0.1 --port {}", server.port);
    let server = Server::new(dir.path(), "-D there/1");
    done(
        dir.path(),
        &format!("pre-dump -t {} -D here/1 {}", holder.pid(), to(&server)),
    );
    assert!(server.ends_well());
    holder.change();
    let was = holder.asked();
    let server = Server::new(dir.path(), "-D there/2 --prev-images-dir ../1 --auto-dedup");
    let line = format!(
        "dump -t {} -D here/2 --prev-images-dir ../1 --track-mem {}",
        holder.pid(),
        to(&server)
    );
    done(dir.path(), &line);
    holder.ended();
    assert!(server.ends_well());
    // What did not change came once.
    let size = |name: &str| fs::metadata(at(name)).unwrap().len();
    assert!(size("there/1/pages-1.img") > 16 << 20);
    assert!(size("there/2/pages-1.img") < 4 << 20);
    for entry in fs::read_dir(at("here/2")).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), at("there/2").join(entry.file_name())).unwrap();
        }
    }
    done(dir.path(), "restore -d -S -D there/2");
    assert_eq!(holder.asked(), was);
}

#[test]
fn a_server_that_is_not_there_or_goes_leaves_the_tree_running() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut sleeper = Sleeper::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let line = format!(
        "dump -t {} --page-server --address 127.0.0.1 --port {port}",
        sleeper.pid()
    );
    let gone = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let out = criu(dir.path(), &line);
    gone.join().unwrap();
    assert_eq!(out.status.code(), Some(1));
    assert!(sleeper.sleeps());
    let out = criu(dir.path(), &line);
    assert!(
        text(&out.stderr).contains(&format!("port {port}")),
        "{out:?}"
    );
    assert!(sleeper.sleeps());
    let images = fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(images, 0);
    // A dump that breaks off leaves no list of pages.
    let server = Server::new(dir.path(), "");
    drop(std::net::TcpStream::connect(("127.0.0.1", server.port)).unwrap());
    assert!(!server.ends_well());
}
