//! A helper process holds files; they are saved from here, made again here,
//! given to a second helper and saved once more: both dumps must agree.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use super::*;
use crate::image::schema::{FdTypes, FdinfoEntry, FileEntry};
use crate::image::{DirSink, DirSource};
use crate::sys::process::pidfd_open;

/// A stopped process that has exactly the given descriptors.
struct Holder(Pid);

impl Holder {
    fn new(fds: &[(RawFd, BorrowedFd<'_>)]) -> Self {
        let pairs: Vec<_> = fds.iter().map(|(n, f)| (*n, f.as_raw_fd())).collect();
        assert!(
            pairs.iter().all(|(n, f)| *n >= 500 && *f < 500),
            "numbers are apart"
        );
        // SAFETY: the child makes plain system calls only, on memory made before.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                for &(number, ours) in &pairs {
                    // SAFETY: numbers only.
                    unsafe { libc::dup2(ours, number) };
                }
                // SAFETY: numbers only; nothing owned is used any more.
                unsafe {
                    libc::close_range(0, 499, 0);
                    loop {
                        libc::raise(libc::SIGSTOP);
                    }
                }
            }
            ForkResult::Parent { child } => {
                waitpid(child, Some(WaitPidFlag::WUNTRACED)).unwrap();
                Self(child)
            }
        }
    }

    fn save(&self, saver: &mut FileSaver) -> Vec<FdinfoEntry> {
        let pid = self.0.as_raw();
        let pidfd = pidfd_open(pid).unwrap();
        let task = TaskFiles {
            pid,
            pidfd: pidfd.as_fd(),
            comm: "holder",
            mnt_ns: 0,
        };
        saver.save_fds(&task).unwrap()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        kill(self.0, Signal::SIGKILL).unwrap();
        waitpid(self.0, None).unwrap();
    }
}

struct Env {
    root: File,
    journal: tempfile::TempDir,
}

impl RestoreEnv for Env {
    fn root_dir(&self, mnt_ns: u32) -> io::Result<BorrowedFd<'_>> {
        assert_eq!(mnt_ns, 0);
        Ok(self.root.as_fd())
    }
    fn journal_interim(&self, id: u32) -> io::Result<OwnedFd> {
        let path = self.journal.path().join(id.to_string());
        Ok(OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)?
            .into())
    }
    fn away(&self) -> Duration {
        Duration::ZERO
    }
}

const CLOSING: fn() -> FilePolicy = || FilePolicy {
    tcp: TcpPolicy::Close,
    unix: UnixPolicy::Close,
    ..FilePolicy::frozen()
};

/// Everything of a file that another kernel must not change.
fn essence(entry: &FileEntry) -> FileEntry {
    let mut e = entry.clone();
    if let Some(p) = &mut e.pipe {
        p.pipe_id = 0;
    }
    if let Some(f) = &mut e.fifo {
        f.pipe_id = 0;
    }
    if let Some(s) = &mut e.isk {
        s.ino = 0;
    }
    if let Some(s) = &mut e.usk {
        (s.ino, s.peer) = (0, u32::from(s.peer != 0));
    }
    if let Some(n) = &mut e.nlsk {
        n.ino = 0;
    }
    if let Some(r) = &mut e.reg {
        // An unlinked file's name is made of its inode number.
        r.name = r.name.split('#').next().unwrap().to_owned();
    }
    if let Some(t) = &mut e.tfd {
        t.vnsec = 0;
    }
    if let Some(p) = &mut e.epfd {
        for t in &mut p.tfd {
            (t.tfd, t.inode, t.dev) = (0, None, None);
        }
    }
    e
}

struct RoundTrip {
    files: Vec<(RawFd, OwnedFd)>,
}

impl RoundTrip {
    fn get(&self, number: RawFd) -> BorrowedFd<'_> {
        self.files
            .iter()
            .find(|(n, _)| *n == number)
            .unwrap()
            .1
            .as_fd()
    }
}

/// Saves, lets `between` undo what is in the way, makes again, saves again.
fn round_trip(fds: &[(RawFd, BorrowedFd<'_>)], between: impl FnOnce()) -> RoundTrip {
    let dir = tempfile::tempdir().unwrap();
    let holder = Holder::new(fds);
    let mut saver = FileSaver::new(CLOSING()).unwrap();
    let table = holder.save(&mut saver);
    saver.settle().unwrap();
    assert_eq!(saver.refusals(), []);
    let before: Vec<_> = table
        .iter()
        .map(|e| (e.fd, essence(saver.entry(e.id).unwrap())))
        .collect();
    let mut sink = DirSink::create(dir.path()).unwrap();
    saver.finish(&mut sink).unwrap();
    drop(holder);
    between();

    let source = DirSource::open(dir.path()).unwrap();
    let env = Env {
        root: File::open("/").unwrap(),
        journal: tempfile::tempdir().unwrap(),
    };
    let mut builder = FileBuilder::new(&source, &env).unwrap();
    let mut files = Vec::new();
    for e in &table {
        let fd = builder.open(e.id).unwrap().try_clone_to_owned().unwrap();
        files.push((e.fd as RawFd, fd));
    }
    builder.seal().unwrap();
    drop(builder);

    let again: Vec<_> = files.iter().map(|(n, f)| (*n, f.as_fd())).collect();
    let holder = Holder::new(&again);
    let mut saver = FileSaver::new(CLOSING()).unwrap();
    let table_again = holder.save(&mut saver);
    saver.settle().unwrap();
    assert_eq!(saver.refusals(), []);
    let after: Vec<_> = table_again
        .iter()
        .map(|e| (e.fd, essence(saver.entry(e.id).unwrap())))
        .collect();
    for ((fd_a, a), (fd_b, b)) in before.iter().zip(&after) {
        assert_eq!(fd_a, fd_b);
        // What epoll watches is added by a task, not by the builder.
        if a.epfd.is_none() {
            assert_eq!(a, b);
        }
    }
    assert_eq!(before.len(), after.len());
    RoundTrip { files }
}

fn refusals(fds: &[(RawFd, BorrowedFd<'_>)], policy: FilePolicy) -> Vec<String> {
    let holder = Holder::new(fds);
    let mut saver = FileSaver::new(policy).unwrap();
    holder.save(&mut saver);
    saver.settle().unwrap();
    saver.refusals().iter().map(ToString::to_string).collect()
}

fn read_some(fd: BorrowedFd<'_>) -> Vec<u8> {
    let mut b = [0; 4096];
    let n = nix::unistd::read(fd, &mut b).unwrap();
    b[..n].to_vec()
}

fn nonblocking(fd: impl AsFd) {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
}

#[test]
fn files_keep_offset_flags_and_sharing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    std::fs::write(&path, b"0123456789").unwrap();
    let mut reader = File::open(&path).unwrap();
    reader.seek(io::SeekFrom::Start(4)).unwrap();
    let log = OpenOptions::new().append(true).open(&path).unwrap();
    let place = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(dir.path())
        .unwrap();
    let listing = File::open(dir.path()).unwrap();
    let null = OpenOptions::new().write(true).open("/dev/null").unwrap();
    let back = round_trip(
        &[
            (500, reader.as_fd()),
            (501, reader.as_fd()),
            (502, log.as_fd()),
            (503, place.as_fd()),
            (504, listing.as_fd()),
            (505, null.as_fd()),
        ],
        || {},
    );
    assert_eq!(read_some(back.get(500)), b"456789");
    assert_eq!(read_some(back.get(501)), b"", "one description, one offset");
    nix::unistd::write(back.get(502), b"ab").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"0123456789ab");
}

#[test]
fn a_replaced_file_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    std::fs::write(&path, b"long enough").unwrap();
    let file = File::open(&path).unwrap();
    let holder = Holder::new(&[(500, file.as_fd())]);
    let mut saver = FileSaver::new(FilePolicy::frozen()).unwrap();
    let table = holder.save(&mut saver);
    saver.settle().unwrap();
    let images = tempfile::tempdir().unwrap();
    saver
        .finish(&mut DirSink::create(images.path()).unwrap())
        .unwrap();
    std::fs::write(&path, b"short").unwrap();
    let source = DirSource::open(images.path()).unwrap();
    let env = Env {
        root: File::open("/").unwrap(),
        journal: tempfile::tempdir().unwrap(),
    };
    let mut builder = FileBuilder::new(&source, &env).unwrap();
    let FileError::Build { source, .. } = builder.open(table[0].id).unwrap_err() else {
        panic!()
    };
    assert!(matches!(source, BuildError::Changed { .. }), "{source}");
}

#[test]
fn unlinked_files_travel_by_content_and_stay_one_file() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"no name").unwrap();
    let second = super::sys::reopen(file.as_fd(), libc::O_RDONLY).unwrap();
    let back = round_trip(&[(500, file.as_fd()), (501, second.as_fd())], || {});
    nix::unistd::write(back.get(500), b" but one file").unwrap();
    assert_eq!(read_some(back.get(501)), b"no name but one file");
}

#[test]
fn memfds_keep_content_holes_and_seals() {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::unix::fs::FileExt;
    let fd = memfd_create(
        "content",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )
    .unwrap();
    let file = File::from(fd);
    file.set_len(1 << 20).unwrap();
    file.write_all_at(b"deep", 500_000).unwrap();
    super::sys::fcntl_int(file.as_fd(), "seal", 1033, libc::F_SEAL_SHRINK).unwrap();
    let back = round_trip(&[(500, file.as_fd())], || {});
    let again = File::from(back.get(500).try_clone_to_owned().unwrap());
    let mut b = [0; 4];
    again.read_exact_at(&mut b, 500_000).unwrap();
    assert_eq!(&b, b"deep");
    assert!(again.set_len(5).is_err());
    let blocks = nix::sys::stat::fstat(&again).unwrap().st_blocks;
    assert!(blocks <= 16, "holes stay holes: {blocks}");
}

#[test]
fn pipes_keep_data_and_size() {
    let (r, w) = pipe2(OFlag::O_CLOEXEC).unwrap();
    super::sys::fcntl_int(w.as_fd(), "size", 1031, 1 << 20).unwrap();
    nonblocking(&w);
    for _ in 0..300 {
        nix::unistd::write(&w, &[7; 1000]).unwrap();
    }
    let back = round_trip(&[(500, r.as_fd()), (501, w.as_fd())], || {});
    let waiting = |fd: BorrowedFd<'_>| super::sys::bytes_waiting(fd).unwrap();
    assert_eq!(
        (waiting(r.as_fd()), waiting(back.get(500))),
        (300_000, 300_000)
    );
    let size = super::sys::fcntl_int(back.get(500), "size", 1032, 0).unwrap();
    assert_eq!(size, 1 << 20);
    // Only the two descriptors keep it open.
    let RoundTrip { mut files } = back;
    files.retain(|(n, _)| *n == 500);
    let mut all = Vec::new();
    File::from(files.remove(0).1).read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 300_000);
}

#[test]
fn a_pipe_to_a_stranger_is_refused_and_one_to_nobody_is_not() {
    let (r, w) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let said = refusals(&[(500, r.as_fd())], FilePolicy::frozen());
    assert!(said[0].contains("outside the service"), "{said:?}");
    drop(w);
    let back = round_trip(&[(500, r.as_fd())], || {});
    assert_eq!(read_some(back.get(500)), b"");
}

#[test]
fn named_pipes_keep_data() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let both = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    nix::unistd::write(&both, b"queued").unwrap();
    let back = round_trip(&[(500, both.as_fd())], || {
        read_some(both.as_fd());
    });
    assert_eq!(read_some(back.get(500)), b"queued");
}

#[test]
fn event_timer_and_signal_descriptors() {
    let event = EventFd::from_value_and_flags(
        3,
        EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC,
    )
    .unwrap();
    let timer = super::sys::timerfd_create(libc::CLOCK_MONOTONIC).unwrap();
    super::sys::timerfd_settime(timer.as_fd(), 0, (1000, 0), (60, 0)).unwrap();
    super::sys::timerfd_set_ticks(timer.as_fd(), 5).unwrap();
    let unarmed = super::sys::timerfd_create(libc::CLOCK_BOOTTIME).unwrap();
    let signals = super::sys::signalfd(0x4002).unwrap();
    let back = round_trip(
        &[
            (500, event.as_fd()),
            (501, timer.as_fd()),
            (502, unarmed.as_fd()),
            (503, signals.as_fd()),
        ],
        || {},
    );
    assert_eq!(read_some(back.get(500)), 1u64.to_ne_bytes());
    assert_eq!(read_some(back.get(501)), 5u64.to_ne_bytes());
}

#[test]
fn what_epoll_watches_is_found_under_any_number() {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let events: Vec<_> = (0..3)
        .map(|_| EventFd::from_value_and_flags(1, EfdFlags::EFD_CLOEXEC).unwrap())
        .collect();
    for (i, e) in events.iter().enumerate() {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        epoll
            .add(e, EpollEvent::new(flags, 0xabc0_0000_0000 + i as u64))
            .unwrap();
    }
    let mut fds = vec![(500, epoll.0.as_fd())];
    fds.extend(
        events
            .iter()
            .enumerate()
            .map(|(i, e)| (501 + i as RawFd, e.as_fd())),
    );
    let holder = Holder::new(&fds);
    let mut saver = FileSaver::new(FilePolicy::frozen()).unwrap();
    let table = holder.save(&mut saver);
    saver.settle().unwrap();
    assert_eq!(saver.refusals(), []);
    let dir = tempfile::tempdir().unwrap();
    saver
        .finish(&mut DirSink::create(dir.path()).unwrap())
        .unwrap();

    let source = DirSource::open(dir.path()).unwrap();
    let env = Env {
        root: File::open("/").unwrap(),
        journal: tempfile::tempdir().unwrap(),
    };
    let mut builder = FileBuilder::new(&source, &env).unwrap();
    let id = |fd: u32| table.iter().find(|e| e.fd == fd).unwrap().id;
    let mut targets = builder.extra(id(500)).unwrap().epoll_targets.clone();
    targets.sort_unstable();
    assert_eq!(targets, [id(501), id(502), id(503)]);
    let mut program = crate::remote::Program::new();
    builder
        .late(holder.0.as_raw(), &table, &mut program)
        .unwrap();
    let adds = program
        .ops()
        .iter()
        .filter(|o| o.nr == libc::SYS_epoll_ctl)
        .count();
    assert_eq!(adds, 3);
    // The numbers are those of this test, not of the helper.
    assert!(program.ops().iter().any(|o| o.nr == libc::SYS_pidfd_getfd));

    let only_epoll = refusals(&fds[..1], FilePolicy::frozen());
    assert!(
        only_epoll[0].contains("no process of the service holds"),
        "{only_epoll:?}"
    );
}

#[test]
fn tcp_listeners_and_udp_sockets_listen_again() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp6 = TcpListener::bind("[::1]:0").unwrap();
    super::sys::listen(tcp.as_fd(), 77).unwrap();
    let set = |level, name, v: i32| {
        super::sys::set_socket_option(tcp.as_fd(), level, name, &v.to_ne_bytes()).unwrap();
    };
    set(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
    set(libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let loose = super::sys::socket(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
    let (at, udp_at) = (tcp.local_addr().unwrap(), udp.local_addr().unwrap());
    let fds: Vec<OwnedFd> = vec![tcp.into(), tcp6.into(), udp.into(), loose];
    let list: Vec<_> = fds
        .iter()
        .enumerate()
        .map(|(i, f)| (500 + i as RawFd, f.as_fd()))
        .collect();
    let copies: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let back = round_trip(&list, || {
        // The old sockets go, as with their kernel: null takes their numbers.
        let null = File::open("/dev/null").unwrap();
        for &fd in &copies {
            // SAFETY: the numbers belong to `fds`, which keeps owning them.
            assert!(unsafe { libc::dup3(null.as_raw_fd(), fd, libc::O_CLOEXEC) } >= 0);
        }
    });
    let mut client = TcpStream::connect(at).unwrap();
    let server = super::sys::accept(back.get(500)).unwrap();
    client.write_all(b"hello").unwrap();
    assert_eq!(read_some(server.as_fd()), b"hello");
    UdpSocket::bind("127.0.0.1:0")
        .unwrap()
        .send_to(b"dgram", udp_at)
        .unwrap();
    assert_eq!(read_some(back.get(502)), b"dgram");
}

#[test]
fn established_connections_are_refused_or_come_back_closed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    let said = refusals(&[(500, server.as_fd())], FilePolicy::frozen());
    assert!(said[0].contains("established TCP connection"), "{said:?}");

    let dir = tempfile::tempdir().unwrap();
    let holder = Holder::new(&[(500, server.as_fd())]);
    let mut saver = FileSaver::new(CLOSING()).unwrap();
    let table = holder.save(&mut saver);
    saver.settle().unwrap();
    saver
        .finish(&mut DirSink::create(dir.path()).unwrap())
        .unwrap();
    let source = DirSource::open(dir.path()).unwrap();
    let env = Env {
        root: File::open("/").unwrap(),
        journal: tempfile::tempdir().unwrap(),
    };
    let mut builder = FileBuilder::new(&source, &env).unwrap();
    let fd = builder.open(table[0].id).unwrap();
    assert_eq!(read_some(fd), b"", "end of file");
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    epoll
        .add(
            fd,
            EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, 1),
        )
        .unwrap();
    let mut events = [EpollEvent::empty()];
    assert_eq!(epoll.wait(&mut events, EpollTimeout::ZERO).unwrap(), 1);
    let got = events[0].events();
    assert!(got.contains(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLHUP));
}

#[test]
fn unix_pairs_keep_queues_and_flags() {
    let (a, b) = UnixStream::pair().unwrap();
    (&a).write_all(b"to b").unwrap();
    (&b).write_all(b"to a").unwrap();
    a.set_nonblocking(true).unwrap();
    let (c, d) = UnixDatagram::pair().unwrap();
    c.send(b"one").unwrap();
    c.send(b"two").unwrap();
    let back = round_trip(
        &[
            (500, a.as_fd()),
            (501, b.as_fd()),
            (502, c.as_fd()),
            (503, d.as_fd()),
        ],
        || {},
    );
    assert_eq!(read_some(back.get(500)), b"to a");
    assert_eq!(read_some(back.get(501)), b"to b");
    assert_eq!(read_some(back.get(503)), b"one");
    assert_eq!(read_some(back.get(503)), b"two");
    nix::unistd::write(back.get(501), b"still").unwrap();
    assert_eq!(read_some(back.get(500)), b"still");
    // Looking did not take anything away.
    assert_eq!(read_some(a.as_fd()), b"to a");
}

#[test]
fn unix_listeners_come_back_at_their_path_with_their_connections() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    let (server, _) = listener.accept().unwrap();
    (&client).write_all(b"request").unwrap();
    let back = round_trip(
        &[
            (500, listener.as_fd()),
            (501, client.as_fd()),
            (502, server.as_fd()),
        ],
        || {},
    );
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o640);
    assert_eq!(read_some(back.get(502)), b"request");
    let second = UnixStream::connect(&path).unwrap();
    let accepted = super::sys::accept(back.get(500)).unwrap();
    (&second).write_all(b"new").unwrap();
    assert_eq!(read_some(accepted.as_fd()), b"new");
}

#[test]
fn unix_connections_to_strangers() {
    let (a, b) = UnixStream::pair().unwrap();
    let (c, _d) = UnixDatagram::pair().unwrap();
    let said = refusals(&[(500, a.as_fd()), (501, c.as_fd())], FilePolicy::frozen());
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("outside the service"), "{said:?}");
    (&b).write_all(b"last words").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let holder = Holder::new(&[(500, a.as_fd()), (501, c.as_fd())]);
    let mut saver = FileSaver::new(CLOSING()).unwrap();
    let table = holder.save(&mut saver);
    saver.settle().unwrap();
    saver
        .finish(&mut DirSink::create(dir.path()).unwrap())
        .unwrap();
    let source = DirSource::open(dir.path()).unwrap();
    let env = Env {
        root: File::open("/").unwrap(),
        journal: tempfile::tempdir().unwrap(),
    };
    let mut builder = FileBuilder::new(&source, &env).unwrap();
    let stream = builder.open(table[0].id).unwrap();
    assert_eq!(read_some(stream), b"last words");
    assert_eq!(read_some(stream), b"");
    let datagram = builder.open(table[1].id).unwrap();
    let e = super::sys::send(datagram, b"x").unwrap_err();
    assert_eq!(e.errno, nix::errno::Errno::ECONNREFUSED);
}

#[test]
fn descriptors_in_flight_are_refused() {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let (a, b) = UnixStream::pair().unwrap();
    let rights = [0];
    let control = [ControlMessage::ScmRights(&rights)];
    let data = [io::IoSlice::new(b"x")];
    sendmsg::<()>(a.as_raw_fd(), &data, &control, MsgFlags::empty(), None).unwrap();
    let said = refusals(&[(500, a.as_fd()), (501, b.as_fd())], FilePolicy::frozen());
    assert!(said[0].contains("under way"), "{said:?}");
}

#[test]
fn netlink_sockets_listen_to_the_same_groups() {
    let nl = super::sys::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).unwrap();
    let mut address = [0u8; 12];
    address[0] = libc::AF_NETLINK as u8;
    address[4..8].copy_from_slice(&0x7fff_1234u32.to_ne_bytes());
    address[8] = 1;
    super::sys::bind(nl.as_fd(), &address).unwrap();
    let ours = nl.as_raw_fd();
    round_trip(&[(500, nl.as_fd())], || {
        let null = File::open("/dev/null").unwrap();
        // SAFETY: the number belongs to `nl`, which keeps owning it.
        assert!(unsafe { libc::dup3(null.as_raw_fd(), ours, libc::O_CLOEXEC) } >= 0);
    });
}

#[test]
fn locks_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    std::fs::write(&path, b"").unwrap();
    let file = File::open(&path).unwrap();
    file.lock().unwrap();
    let ours = file.as_raw_fd();
    let back = round_trip(&[(500, file.as_fd())], || {
        let null = File::open("/dev/null").unwrap();
        // SAFETY: the number belongs to `file`, which keeps owning it.
        assert!(unsafe { libc::dup3(null.as_raw_fd(), ours, libc::O_CLOEXEC) } >= 0);
    });
    let other = File::open(&path).unwrap();
    assert!(other.try_lock().is_err(), "still locked");
    drop(back);
    other.try_lock().unwrap();
}

#[test]
fn signal_owners_are_set_by_a_holder_and_refused_outside() {
    let (a, b) = UnixStream::pair().unwrap();
    let fds = [(500, a.as_fd()), (501, b.as_fd())];
    let own = |pid: i32| {
        // SAFETY: numbers only.
        assert!(unsafe { libc::fcntl(a.as_raw_fd(), libc::F_SETOWN, pid) } >= 0);
    };
    own(std::process::id() as i32);
    let said = refusals(&fds, FilePolicy::frozen());
    assert!(said[0].contains("its signals go to process"), "{said:?}");

    let holder = Holder::new(&fds);
    own(holder.0.as_raw());
    fcntl(&a, FcntlArg::F_SETFL(OFlag::O_ASYNC)).unwrap();
    let mut saver = FileSaver::new(FilePolicy::frozen()).unwrap();
    let table = holder.save(&mut saver);
    saver.settle().unwrap();
    let dir = tempfile::tempdir().unwrap();
    saver
        .finish(&mut DirSink::create(dir.path()).unwrap())
        .unwrap();
    let source = DirSource::open(dir.path()).unwrap();
    let env = Env {
        root: File::open("/").unwrap(),
        journal: tempfile::tempdir().unwrap(),
    };
    let builder = FileBuilder::new(&source, &env).unwrap();
    let mut program = crate::remote::Program::new();
    builder.last(holder.0.as_raw(), &table, &mut program);
    assert_eq!(
        program
            .ops()
            .iter()
            .filter(|o| o.nr == libc::SYS_fcntl)
            .count(),
        2
    );
}

#[test]
fn what_is_not_carried_is_named() {
    let inotify =
        nix::sys::inotify::Inotify::init(nix::sys::inotify::InitFlags::IN_CLOEXEC).unwrap();
    let terminal =
        nix::pty::posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).unwrap();
    let namespace = File::open("/proc/self/ns/net").unwrap();
    let said = refusals(
        &[
            (500, inotify.as_fd()),
            (501, terminal.as_fd()),
            (502, namespace.as_fd()),
        ],
        FilePolicy::live(),
    );
    assert_eq!(said.len(), 3, "{said:?}");
    for (said, word) in said.iter().zip(["inotify", "tty", "namespace descriptor"]) {
        assert!(said.contains(word), "{said}");
        assert!(said.starts_with("holder (pid "), "{said}");
    }
}

#[test]
fn files_without_a_descriptor_share_their_records() {
    let exe = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open("/proc/self/exe");
    let exe = exe.unwrap();
    let me = std::process::id() as i32;
    let pidfd = pidfd_open(me).unwrap();
    let task = TaskFiles {
        pid: me,
        pidfd: pidfd.as_fd(),
        comm: "test",
        mnt_ns: 0,
    };
    let mut saver = FileSaver::new(FilePolicy::live()).unwrap();
    let a = saver
        .save_path_fd(&task, exe.as_fd(), 0, "executable")
        .unwrap()
        .unwrap();
    let b = saver
        .save_path_fd(&task, exe.as_fd(), 0, "executable")
        .unwrap();
    assert_eq!(b, Some(a));
    let reg = saver.entry(a).unwrap().reg.clone().unwrap();
    assert!(Path::new(&reg.name).exists());
    assert_eq!(saver.entry(a).unwrap().r#type(), FdTypes::Reg);
}
