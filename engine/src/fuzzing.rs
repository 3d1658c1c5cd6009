//! Every parser of bytes that somebody else wrote, one function each, for the
//! fuzz targets in `fuzz/`. No part of the engine's interface.
//!
//! None of them panics, loops for ever, or takes memory without bound, whatever
//! the bytes.

use crate::clock::Offsets;
use crate::content::schema::TreeEntry;
use crate::ext::*;
use crate::file::bpf::MapsBack;
use crate::file::fdinfo::FdInfo;
use crate::file::pipe::PipesBack;
use crate::file::record::*;
use crate::image::schema::*;
use crate::image::{ImageReader, ImageSource, Kind};
use crate::memory::extra::RcrMm;
use crate::memory::heritage::SharedPages;
use crate::memory::pages::Saved;
use crate::memory::{aio, heritage, maps, vdso};
use crate::namespace::mnt::mountinfo;
use crate::namespace::mnt::schema::{HostMountsEntry, MountsEntry};
use crate::namespace::net::schema::NetEntry;
use crate::namespace::user::RcrUsernsEntry;
use crate::namespace::{ipc, net, user};
use crate::predump::RcrTracking;
use crate::socket::{fuzzing as socket, unix_queue};
use crate::task::{limits, nap, status::Status, timers};
use crate::tree::Stat;

/// Kinds of images by number; the reader checks that the header fits.
const KINDS: &[Kind] = &[
    Kind::Inventory,
    Kind::Pstree,
    Kind::Fdinfo,
    Kind::Pagemap,
    Kind::Core,
    Kind::Ids,
    Kind::PipesData,
    Kind::FifoData,
    Kind::SkQueues,
    Kind::Utsns,
    Kind::RemapFpath,
    Kind::GhostFile,
    Kind::TcpStream,
    Kind::Mnts,
    Kind::TtyInfo,
    Kind::TtyData,
    Kind::FileLocks,
    Kind::Fs,
    Kind::Mm,
    Kind::Cgroup,
    Kind::Cpuinfo,
    Kind::Userns,
    Kind::Seccomp,
    Kind::Files,
    Kind::BpfmapData,
    Kind::MemfdInode,
    Kind::Timens,
    Kind::Pidns,
    Kind::Netns,
    Kind::Netdev,
    Kind::IpcVar,
    Kind::IpcShm,
    Kind::IpcMsg,
    Kind::IpcSem,
    Kind::Apparmor,
    Kind::Stats,
    Kind::RcrFiles,
    Kind::RcrTasks,
    Kind::RcrNamespaces,
    Kind::RcrContent,
    Kind::RcrNetwork,
];

/// Decodes every record as one type.
macro_rules! decoders {
    ($($name:ident),* $(,)?) => {
        &[$(|r| matches!(r.record::<$name>(), Ok(Some(_)))),*]
    };
}

type Decode = fn(&mut ImageReader<'_>) -> bool;

/// Every type of record.
const RECORDS: &[Decode] = decoders![
    CoreEntry,
    TaskCoreEntry,
    ThreadCoreEntry,
    TaskKobjIdsEntry,
    ThreadSasEntry,
    TaskRlimitsEntry,
    RlimitEntry,
    RseqEntry,
    CredsEntry,
    SaEntry,
    SiginfoEntry,
    SignalQueueEntry,
    AaNamespace,
    AaPolicy,
    ApparmorEntry,
    SeccompEntry,
    SeccompFilter,
    FdinfoEntry,
    FileEntry,
    FownEntry,
    RegFileEntry,
    FsEntry,
    NsFileEntry,
    RemapFilePathEntry,
    GhostFileEntry,
    GhostChunkEntry,
    PipeEntry,
    PipeDataEntry,
    FifoEntry,
    EventfdFileEntry,
    EventpollFileEntry,
    EventpollTfdEntry,
    TimerfdEntry,
    SignalfdEntry,
    MemfdFileEntry,
    MemfdInodeEntry,
    PidfdEntry,
    ExtFileEntry,
    FileLockEntry,
    BpfmapDataEntry,
    BpfmapFileEntry,
    Timeval,
    InotifyFileEntry,
    InotifyWdEntry,
    FanotifyFileEntry,
    FanotifyInodeMarkEntry,
    FanotifyMarkEntry,
    FanotifyMountMarkEntry,
    FhEntry,
    IrmapCacheEntry,
    InventoryEntry,
    PluginsEntry,
    PstreeEntry,
    StatsEntry,
    DumpStatsEntry,
    RestoreStatsEntry,
    CpuinfoEntry,
    CpuinfoPpc64Entry,
    CpuinfoS390Entry,
    CpuinfoX86Entry,
    ImgStreamerReplyEntry,
    ImgStreamerRequestEntry,
    CgControllerEntry,
    CgMemberEntry,
    CgSetEntry,
    CgroupDirEntry,
    CgroupEntry,
    CgroupPerms,
    CgroupPropEntry,
    MmEntry,
    AioRingEntry,
    VmaEntry,
    PagemapHead,
    PagemapEntry,
    PagemapBlocks,
    AutofsEntry,
    BinfmtMiscEntry,
    IpcDescEntry,
    IpcMsg,
    IpcMsgEntry,
    IpcSemEntry,
    IpcShmEntry,
    IpcVarEntry,
    MacvlanLinkEntry,
    MntEntry,
    NetDeviceEntry,
    NetnsEntry,
    NetnsId,
    PidnsEntry,
    SitEntry,
    SysctlEntry,
    TimensEntry,
    Timespec,
    TunLinkEntry,
    TunfileEntry,
    UidGidExtent,
    UsernsEntry,
    UtsnsEntry,
    SkOptsEntry,
    UnixSkEntry,
    FilePermsEntry,
    InetSkEntry,
    IpOptsEntry,
    IpOptsRawEntry,
    TcpOptsEntry,
    TcpStreamEntry,
    SkPacketEntry,
    NetlinkSkEntry,
    PacketMclist,
    PacketRing,
    PacketSockEntry,
    ScmEntry,
    SkUcredEntry,
    ItimerEntry,
    PosixTimerEntry,
    TaskTimersEntry,
    TtyFileEntry,
    TtyInfoEntry,
    TtyPtyEntry,
    TtyDataEntry,
    TermiosEntry,
    WinsizeEntry,
    ThreadInfoX86,
    UserX86RegsEntry,
    UserX86FpregsEntry,
    UserX86XsaveEntry,
    UserX86CetEntry,
    UserDescT,
    RcrInventory,
    RcrTask,
    RcrThread,
    RcrNetwork,
    RcrFilesHead,
    RcrFile,
    TreeEntry,
    RcrMm,
    SharedPages,
    RcrTracking,
    NetEntry,
    RcrUsernsEntry,
    MountsEntry,
    HostMountsEntry,
];

/// An image: which kind, which type of record, the bytes.
pub fn image(kind: u8, record: u8, bytes: &[u8]) {
    let kind = KINDS[usize::from(kind) % KINDS.len()];
    let decode = RECORDS[usize::from(record) % RECORDS.len()];
    let Ok(mut reader) = ImageReader::new("fuzz.img", kind, bytes) else {
        return;
    };
    while decode(&mut reader) {
        // Some records say how much content follows; a byte here does.
        if let Ok(&[len]) = reader.payload(1) {
            let _ = reader.payload(len.into());
        }
    }
    reader.rest();
}

/// A record of any type, without an image around it.
pub fn record(record: u8, bytes: &[u8]) {
    let mut image = crate::image::ImageWriter::new(Kind::Core);
    image.payload(&(bytes.len() as u32).to_le_bytes());
    image.payload(bytes);
    let image = image.finish();
    let decode = RECORDS[usize::from(record) % RECORDS.len()];
    if let Ok(mut reader) = ImageReader::new("fuzz.img", Kind::Core, &image) {
        decode(&mut reader);
    }
}

/// Readers of images that have content between their records.
pub fn contents(source: &dyn ImageSource) {
    let _ = PipesBack::load(source);
    let _ = MapsBack::load(source);
    let _ = unix_queue::load(source);
    let _ = ipc::read(source, NS);
    let _ = RcrMm::load(source, PID);
    net::fuzzing::streams(source, "route-9.img");
}

/// The namespace and the process that images are read of.
const NS: u32 = 1;
const PID: i32 = 2;

/// Page content and who owns it.
pub fn pages(source: &dyn ImageSource) {
    let _ = Saved::load(source, "pagemap-2.img");
    let _ = Saved::load_partly(
        source,
        "pagemap-2.img",
        std::slice::from_ref(&(4096..1 << 20)),
    );
    let (Ok(own), Ok(heir)) = (
        heritage::pages(source, PID),
        heritage::pages(source, PID + 1),
    ) else {
        return;
    };
    let born = heritage::before_births(&own, &[(PID + 1, &heir)]);
    heritage::changes(&born, &heir, &[]);
}

/// What a network namespace's rules are made from.
pub fn rules(bytes: &[u8]) {
    if let Ok(net) = <NetEntry as prost::Message>::decode(bytes) {
        net::fuzzing::rules(&net);
    }
}

/// Every text file of /proc.
pub fn proc(which: u8, bytes: &[u8]) {
    let text = || String::from_utf8_lossy(bytes);
    match which % 14 {
        0 => drop(maps::parse(bytes)),
        1 => drop(FdInfo::parse(&text())),
        2 => drop(Stat::parse(bytes)),
        3 => {
            let status = Status::parse(bytes);
            let _ = status.creds(0);
            let _ = (status.seccomp_mode(), status.locked_kib(), status.umask());
        }
        4 => drop(mountinfo::parse(bytes)),
        5 => drop(timers::parse(&text())),
        6 => drop(limits::parse(&text())),
        7 => drop(user::parse_map(&text())),
        8 => drop(Offsets::parse(&text())),
        9 => drop(nap::call_number(&text())),
        10 => drop(nap::last_ran(&text())),
        11 => socket::groups(&text()),
        12 => drop(aio::waiting(bytes)),
        _ => {
            if let Some(offsets) = Offsets::parse(&text()) {
                offsets.to_text();
            }
        }
    }
}

/// What comes over netlink sockets.
pub fn netlink(bytes: &[u8]) {
    socket::diagnosis(bytes);
    net::fuzzing::netlink(bytes);
}

/// A vDSO out of an image, turned into jumps to another.
pub fn vdso(bytes: &[u8]) {
    let _ = vdso::redirect(bytes, bytes, 0x7fff_0000_0000);
}
