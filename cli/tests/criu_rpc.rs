//! The criu front's service, as a container engine speaks with it.

mod front;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Child;

use front::{Holder, command, inherited_pipe, may_dump};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket,
};
use nix::sys::wait::WaitStatus;
use prost::Message;

const DUMP: i32 = 1;
const RESTORE: i32 = 2;
const CHECK: i32 = 3;
const PRE_DUMP: i32 = 4;
const PAGE_SERVER: i32 = 5;
const NOTIFY: i32 = 6;
const CPUINFO_DUMP: i32 = 7;
const CPUINFO_CHECK: i32 = 8;
const FEATURE_CHECK: i32 = 9;
const VERSION: i32 = 10;
const PAGE_SERVER_CHLD: i32 = 12;
const SINGLE_PRE_DUMP: i32 = 13;

/// `criu_req`, as far as it is used here.
#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(int32, required, tag = "1")]
    kind: i32,
    #[prost(message, optional, tag = "2")]
    options: Option<Wishes>,
    #[prost(bool, optional, tag = "3")]
    notify_success: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    keep_open: Option<bool>,
    #[prost(message, optional, tag = "5")]
    features: Option<Features>,
}

/// `criu_opts`.
#[derive(Clone, PartialEq, Message)]
struct Wishes {
    #[prost(int32, required, tag = "1")]
    images_dir_fd: i32,
    #[prost(int32, optional, tag = "2")]
    pid: Option<i32>,
    #[prost(int32, optional, tag = "9")]
    log_level: Option<i32>,
    #[prost(message, optional, tag = "11")]
    server: Option<Server>,
    #[prost(bool, optional, tag = "12")]
    notify_scripts: Option<bool>,
    #[prost(string, optional, tag = "14")]
    parent: Option<String>,
    #[prost(bool, optional, tag = "15")]
    track_mem: Option<bool>,
    #[prost(uint32, optional, tag = "20")]
    cpu_cap: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct Server {
    #[prost(string, optional, tag = "1")]
    address: Option<String>,
    #[prost(int32, optional, tag = "2")]
    port: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Features {
    #[prost(bool, optional, tag = "1")]
    mem_track: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
struct Restored {
    #[prost(int32, required, tag = "1")]
    pid: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Stage {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
}

/// `criu_resp`.
#[derive(Clone, PartialEq, Message)]
struct Answer {
    #[prost(int32, required, tag = "1")]
    kind: i32,
    #[prost(bool, required, tag = "2")]
    success: bool,
    #[prost(message, optional, tag = "4")]
    restored: Option<Restored>,
    #[prost(message, optional, tag = "5")]
    stage: Option<Stage>,
    #[prost(message, optional, tag = "6")]
    server: Option<Server>,
    #[prost(message, optional, tag = "8")]
    features: Option<Features>,
    #[prost(string, optional, tag = "9")]
    error: Option<String>,
}

/// A service, ended when dropped.
struct Service(Child);

impl Service {
    fn new(dir: &Path) -> Self {
        let (reader, writer, number) = inherited_pipe();
        let line = format!(
            "service --address {}/socket --status-fd {number}",
            dir.display()
        );
        let child = command(dir, &line).spawn().unwrap();
        drop(writer);
        let mut ready = [1];
        nix::unistd::read(&reader, &mut ready).unwrap();
        assert_eq!(ready, [0]);
        Self(child)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Client(OwnedFd);

impl Client {
    fn new(dir: &Path) -> Self {
        let kind = SockType::SeqPacket;
        let fd = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
        connect(fd.as_raw_fd(), &UnixAddr::new(&dir.join("socket")).unwrap()).unwrap();
        Self(fd)
    }

    fn send(&self, request: &Request) {
        let bytes = request.encode_to_vec();
        send(self.0.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL).unwrap();
    }

    fn answer(&self) -> Answer {
        let mut bytes = vec![0; 1 << 16];
        let n = recv(self.0.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap();
        assert!(n > 0, "the service has gone");
        Answer::decode(&bytes[..n]).unwrap()
    }

    fn ask(&self, request: &Request) -> Answer {
        self.send(request);
        self.answer()
    }
}

fn request(kind: i32) -> Request {
    Request {
        kind,
        ..Request::default()
    }
}

/// One about a process, with images in a directory that is open.
fn about(kind: i32, pid: i32, dir: &fs::File) -> Request {
    let options = Wishes {
        images_dir_fd: dir.as_raw_fd(),
        pid: Some(pid),
        log_level: Some(4),
        ..Wishes::default()
    };
    Request {
        kind,
        options: Some(options),
        ..Request::default()
    }
}

fn opened(dir: &Path, name: &str) -> fs::File {
    let path = dir.join(name);
    fs::create_dir(&path).unwrap();
    fs::File::open(path).unwrap()
}

#[test]
fn questions_are_answered() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _service = Service::new(dir.path());
    let images = opened(dir.path(), "images");
    let client = Client::new(dir.path());
    let mut asked = request(VERSION);
    asked.keep_open = Some(true);
    assert!(client.ask(&asked).success);
    let mut features = request(FEATURE_CHECK);
    features.features = Some(Features {
        mem_track: Some(true),
    });
    features.keep_open = Some(true);
    assert!(client.ask(&features).features.unwrap().mem_track.is_some());
    assert!(client.ask(&request(CHECK)).success);
    for (kind, good) in [
        (CPUINFO_CHECK, false),
        (CPUINFO_DUMP, true),
        (CPUINFO_CHECK, true),
    ] {
        let answer = Client::new(dir.path()).ask(&about(kind, 1, &images));
        assert_eq!((answer.kind, answer.success), (kind, good), "{answer:?}");
    }
    let answer = Client::new(dir.path()).ask(&request(77));
    assert!(!answer.success && answer.error.is_some(), "{answer:?}");
    // There is no such process, and whoever asks is told.
    let answer = Client::new(dir.path()).ask(&about(DUMP, 4_194_303, &images));
    assert!(answer.error.unwrap().contains("4194303"));
}

#[test]
fn a_tree_goes_there_and_back_with_word_at_each_stage() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _service = Service::new(dir.path());
    let images = opened(dir.path(), "images");
    let holder = Holder::new(dir.path());
    let was = holder.asked();
    let mut stages = Vec::new();
    for kind in [DUMP, RESTORE] {
        let mut request = about(kind, holder.pid(), &images);
        request.options.as_mut().unwrap().notify_scripts = Some(true);
        request.options.as_mut().unwrap().cpu_cap = Some(5);
        let client = Client::new(dir.path());
        client.send(&request);
        let answer = loop {
            let answer = client.answer();
            if answer.kind != NOTIFY {
                break answer;
            }
            stages.push(answer.stage.unwrap().name.unwrap());
            client.send(&Request {
                kind: NOTIFY,
                notify_success: Some(true),
                ..Request::default()
            });
        };
        assert_eq!((answer.kind, answer.success), (kind, true), "{answer:?}");
        if kind == DUMP {
            assert!(matches!(holder.ended(), WaitStatus::Signaled(..)));
        } else {
            assert_eq!(answer.restored.unwrap().pid, holder.pid());
        }
    }
    let want = [
        "pre-dump",
        "post-dump",
        "pre-restore",
        "setup-namespaces",
        "post-setup-namespaces",
        "post-restore",
        "pre-resume",
        "post-resume",
    ];
    assert_eq!(stages, want);
    assert!(dir.path().join("images/cpuinfo.img").exists());
    assert_eq!(holder.asked(), was);
    holder.end_of_another();
}

#[test]
fn generations_come_over_one_connection() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _service = Service::new(dir.path());
    let [first, second, third] = ["1", "2", "3"].map(|n| opened(dir.path(), n));
    let holder = Holder::new(dir.path());
    let single = Client::new(dir.path()).ask(&about(SINGLE_PRE_DUMP, holder.pid(), &first));
    assert!(single.success, "{single:?}");
    let client = Client::new(dir.path());
    holder.change();
    for (kind, images, parent) in [(PRE_DUMP, &second, "../1"), (DUMP, &third, "../2")] {
        let mut request = about(kind, holder.pid(), images);
        let options = request.options.as_mut().unwrap();
        (options.parent, options.track_mem) = (Some(parent.into()), Some(true));
        let answer = client.ask(&request);
        assert!(answer.success, "{answer:?}");
    }
    holder.ended();
    let size = |n: &str| {
        fs::metadata(dir.path().join(n).join("pages-1.img"))
            .unwrap()
            .len()
    };
    assert!(size("1") > 16 << 20 && size("2") < 4 << 20 && size("3") < 4 << 20);
}

#[test]
fn a_page_server_is_started_on_request() {
    if !may_dump() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let _service = Service::new(dir.path());
    for (kind, name) in [(PAGE_SERVER, "a"), (PAGE_SERVER_CHLD, "b")] {
        let images = opened(dir.path(), name);
        let mut request = about(kind, 1, &images);
        request.options.as_mut().unwrap().server = Some(Server {
            address: Some("127.0.0.1".into()),
            port: Some(0),
        });
        let answer = Client::new(dir.path()).ask(&request);
        let port = answer.server.clone().unwrap().port.unwrap();
        let mut stream = TcpStream::connect(("127.0.0.1", port as u16)).unwrap();
        // The end at once: a number and nothing else.
        let mut close = [0; 32];
        close[..2].copy_from_slice(&0x1023u16.to_le_bytes());
        stream.write_all(&close).unwrap();
        let mut status = [1; 4];
        stream.read_exact(&mut status).unwrap();
        assert_eq!(status, [0; 4], "{answer:?}");
    }
}
