//! Sockets.

use super::*;

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

    let holder = Holder::new(&[(500, server.as_fd())]);
    let (dir, table) = images_of(&holder, CLOSING());
    let source = DirSource::open(dir.path()).unwrap();
    let env = Env::new();
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
    let holder = Holder::new(&[(500, a.as_fd()), (501, c.as_fd())]);
    let (dir, table) = images_of(&holder, CLOSING());
    let source = DirSource::open(dir.path()).unwrap();
    let env = Env::new();
    let mut builder = FileBuilder::new(&source, &env).unwrap();
    let stream = builder.open(table[0].id).unwrap();
    assert_eq!(read_some(stream), b"last words");
    assert_eq!(read_some(stream), b"");
    let datagram = builder.open(table[1].id).unwrap();
    let e = super::sys::send(datagram, b"x").unwrap_err();
    assert_eq!(e.errno, nix::errno::Errno::ECONNREFUSED);
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
