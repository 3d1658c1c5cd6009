//! Files of every kind but sockets.

use super::*;

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
    let env = Env::new();
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
    let (dir, table) = images_of(&holder, FilePolicy::frozen());

    let source = DirSource::open(dir.path()).unwrap();
    let env = Env::new();
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
    let (dir, table) = images_of(&holder, FilePolicy::frozen());
    let source = DirSource::open(dir.path()).unwrap();
    let env = Env::new();
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
    let terminal =
        nix::pty::posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).unwrap();
    let memory = File::open("/dev/fuse").unwrap();
    let said = refusals(
        &[(501, terminal.as_fd()), (502, memory.as_fd())],
        FilePolicy::live(),
    );
    assert_eq!(said.len(), 2, "{said:?}");
    // What nobody has opened yet is known to be so when all files were seen.
    for (said, word) in said.iter().zip(["fuse", "was never opened"]) {
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
        voice: me,
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
