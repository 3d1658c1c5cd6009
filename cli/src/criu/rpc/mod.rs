//! CRIU's RPC: `swrk` for one client over an inherited socket, `service` for
//! all that connect.

mod asked;
mod connection;
mod schema;

use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Context, bail};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, getsockopt, listen,
    socket, sockopt,
};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::options::{Command, Options};
use super::places::Places;
use super::{Error, VERSION, check, cpuinfo, dump, generation, page_server, pidfile, restore};
use connection::{Connection, Told};
use schema::{Features, Opts, Req, ReqType, Resp};

/// Where the service listens unless told otherwise.
const ADDRESS: &str = "/var/run/criu_service.socket";

/// Serves one client.
pub fn swrk(fd: i32) -> Result<(), Error> {
    if fd < 0 || !std::path::Path::new(&format!("/proc/self/fd/{fd}")).exists() {
        bail!("swrk: {fd} is not open");
    }
    // SAFETY: the number was given to us for this, it is open, and nothing
    // else here knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let kind = getsockopt(&socket, sockopt::SockType).context("swrk")?;
    if kind != SockType::SeqPacket {
        bail!("swrk: {fd} is no packet socket");
    }
    // What is started from here is not to hold it.
    nix::fcntl::fcntl(
        &socket,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )?;
    serve(&Connection::new(socket)?)
}

/// Serves whoever connects, each in a process of its own.
pub fn service(options: &Options) -> Result<(), Error> {
    let places = Places::open(options)?;
    let address = options.address.clone().unwrap_or(PathBuf::from(ADDRESS));
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    let told = || address.display().to_string();
    bind(
        std::os::fd::AsRawFd::as_raw_fd(&listener),
        &UnixAddr::new(&address)?,
    )
    .with_context(told)?;
    let mode = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(&address, mode).with_context(told)?;
    listen(&listener, Backlog::new(16)?)?;
    if let Some(name) = &options.pidfile {
        pidfile::write(&places.in_work(name), std::process::id() as i32)?;
    }
    if let Some(fd) = options.status_fd {
        restore::ready(fd)?;
    }
    loop {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status.pid().is_none() {
                break;
            }
        }
        let accepted = accept4(std::os::fd::AsRawFd::as_raw_fd(&listener), flags)?;
        // SAFETY: accept4 has just made it.
        let client = unsafe { OwnedFd::from_raw_fd(accepted) };
        // SAFETY: this process has a single thread.
        match unsafe { fork() }? {
            ForkResult::Parent { .. } => {}
            ForkResult::Child => return serve(&Connection::new(client)?),
        }
    }
}

fn serve(connection: &Connection) -> Result<(), Error> {
    while let Some(request) = connection.request()? {
        let kind = request.r#type();
        tracing::debug!("request {kind:?}");
        let answer = work(&request, connection).unwrap_or_else(|e| {
            tracing::error!("{e:#}");
            Resp {
                r#type: request.r#type,
                success: false,
                cr_errno: Some(errno(&e)),
                cr_errmsg: Some(format!("{e:#}")),
                ..Resp::default()
            }
        });
        let failed = !answer.success;
        connection.answer(&answer)?;
        // After a pre-dump comes another, or the dump.
        let further = request.keep_open == Some(true) || kind == ReqType::PreDump;
        let more = further && !failed;
        if !more {
            break;
        }
    }
    Ok(())
}

/// The number a client gets for an error: that of the kernel where there is one.
fn errno(e: &Error) -> i32 {
    let of = |c: &(dyn std::error::Error + 'static)| {
        let io = c.downcast_ref::<std::io::Error>();
        let io = io.and_then(std::io::Error::raw_os_error);
        io.or(c.downcast_ref::<nix::Error>().map(|e| *e as i32))
    };
    e.chain().find_map(of).unwrap_or(libc::EINVAL)
}

fn work(request: &Req, connection: &Connection) -> Result<Resp, Error> {
    let mut answer = Resp {
        r#type: request.r#type,
        success: true,
        ..Resp::default()
    };
    let none = Opts::default();
    let opts = request.opts.as_ref().unwrap_or(&none);
    let prepared = |command| -> Result<(Options, Places), Error> {
        let options = asked::options(command, opts, connection.client)?;
        let places = Places::open(&options)?;
        Ok((options, places))
    };
    let told = &mut Told {
        connection,
        wanted: opts.notify_scripts == Some(true),
    };
    match request.r#type() {
        ReqType::Version => {
            answer.version = Some(schema::Version {
                major: VERSION.0,
                minor: VERSION.1,
                name: Some(format!("rcr {}", env!("CARGO_PKG_VERSION"))),
                ..schema::Version::default()
            });
        }
        ReqType::Check => {
            let missing = check::missing();
            if !missing.is_empty() {
                bail!("missing: {}", missing.join(", "));
            }
        }
        ReqType::FeatureCheck => {
            let asked = request.features.unwrap_or_default();
            let tell = |asked: Option<bool>, name: &str| {
                asked.map(|_| check::feature(name).unwrap_or(false))
            };
            answer.features = Some(Features {
                mem_track: tell(asked.mem_track, "mem_dirty_track"),
                lazy_pages: tell(asked.lazy_pages, "uffd-noncoop"),
                pidfd_store: tell(asked.pidfd_store, "pidfd_store"),
                mem_compression: asked.mem_compression.map(|_| false),
            });
        }
        ReqType::Dump => {
            let (options, places) = prepared(Command::Dump)?;
            if options.pid == Some(connection.client) {
                bail!("a client that dumps itself is not supported: name another process");
            }
            dump::run(&options, &places, told)?;
            answer.dump = Some(schema::DumpResp { restored: None });
        }
        ReqType::PreDump | ReqType::SinglePreDump => {
            let (options, places) = prepared(Command::PreDump)?;
            generation::pre_dump(&options, &places)?;
        }
        ReqType::Restore => {
            let (options, places) = prepared(Command::Restore)?;
            let pid = restore::tree(&options, &places, told)?;
            answer.restore = Some(schema::RestoreResp { pid });
        }
        ReqType::PageServer | ReqType::PageServerChld => {
            let (options, places) = prepared(Command::PageServer)?;
            let (pid, port) = page_server::serve_in_child(&options, &places)?;
            answer.ps = Some(schema::PageServer {
                pid: Some(pid),
                port: Some(port.into()),
                ..schema::PageServer::default()
            });
        }
        ReqType::CpuinfoDump => cpuinfo::write(&prepared(Command::CpuinfoDump)?.1)?,
        ReqType::CpuinfoCheck => {
            let (options, places) = prepared(Command::CpuinfoCheck)?;
            cpuinfo::compare(&places, options.cpu_cap.as_deref())?;
        }
        ReqType::WaitPid => {
            let pid = request.pid.context("no process to wait for")?;
            let status = waitpid(Pid::from_raw(pid as i32), None)
                .with_context(|| format!("waiting for process {pid}"))?;
            answer.status = Some(match status {
                nix::sys::wait::WaitStatus::Exited(_, code) => code << 8,
                nix::sys::wait::WaitStatus::Signaled(_, signal, _) => signal as i32,
                _ => 0,
            });
        }
        other => bail!("a request {other:?} is not offered"),
    }
    Ok(answer)
}
