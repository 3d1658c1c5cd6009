//! Kinds of images: how each file begins.
//!
//! The numbers are those CRIU 4.3 writes. Kinds from [`Kind::RcrFiles`] on are
//! our own; other readers do not know them and need not.

/// What an image file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
#[repr(u32)]
pub enum Kind {
    Inventory = 0x5831_3116,
    Pstree = 0x5027_3030,
    Fdinfo = 0x5621_3732,
    Pagemap = 0x5608_4025,
    Core = 0x5505_3847,
    Ids = 0x5443_2030,
    PipesData = 0x5645_3709,
    FifoData = 0x5933_3054,
    SkQueues = 0x5626_4026,
    Utsns = 0x5447_3203,
    RemapFpath = 0x5913_3954,
    GhostFile = 0x5258_3605,
    TcpStream = 0x5146_5506,
    Mnts = 0x5556_3928,
    TtyInfo = 0x5945_3036,
    TtyData = 0x5941_3026,
    FileLocks = 0x5432_3616,
    Fs = 0x5140_3912,
    Mm = 0x5749_2820,
    Cgroup = 0x5938_3330,
    Cpuinfo = 0x6140_4013,
    Userns = 0x5547_4906,
    Seccomp = 0x6441_3049,
    Files = 0x5630_3138,
    BpfmapData = 0x6432_4033,
    MemfdInode = 0x4845_3499,
    Timens = 0x4311_4433,
    Pidns = 0x6115_7326,
    Netns = 0x5593_3752,
    Netdev = 0x5737_3951,
    IpcVar = 0x5311_5007,
    IpcShm = 0x4628_3044,
    IpcMsg = 0x5545_3737,
    IpcSem = 0x5957_3019,
    Apparmor = 0x5942_3047,
    Stats = 0x5709_3306,
    /// What we record about open files beyond [`crate::image::schema::FileEntry`].
    RcrFiles = 0x7263_7201,
    /// What we record about tasks beyond [`crate::image::schema::CoreEntry`].
    RcrTasks = 0x7263_7202,
    /// What we record about namespaces and mounts.
    RcrNamespaces = 0x7263_7203,
    /// Content of small filesystems that live in RAM.
    RcrContent = 0x7263_7204,
    /// What we record about the network outside of sockets.
    RcrNetwork = 0x7263_7220,
}

/// First word of most images.
const COMMON: u32 = 0x5456_4319;
/// First word of images about the run itself (figures).
const SERVICE: u32 = 0x5510_5940;

impl Kind {
    /// The type's own magic number.
    pub fn magic(self) -> u32 {
        self as u32
    }

    /// The words an image of this kind starts with.
    pub(super) fn header(self) -> Vec<u32> {
        match self {
            Kind::Inventory => vec![self.magic()],
            Kind::Stats => vec![SERVICE, self.magic()],
            _ => vec![COMMON, self.magic()],
        }
    }
}
