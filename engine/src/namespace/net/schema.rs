//! The messages of `rcr-netns-ID.img`: what CRIU's network images have no
//! place for. Rows of netlink messages are kept as the kernel wrote them.

/// A network namespace.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct NetEntry {
    /// Number of the user namespace that owns it; 0 is the host's.
    #[prost(uint32, tag = "1")]
    pub owner: u32,
    /// Its devices, in the order of their numbers.
    #[prost(message, repeated, tag = "2")]
    pub links: Vec<LinkEntry>,
    /// The numbers it gives other namespaces.
    #[prost(message, repeated, tag = "3")]
    pub nsids: Vec<NsidEntry>,
    /// Settings below `/proc/sys/net`.
    #[prost(message, repeated, tag = "4")]
    pub sysctls: Vec<SettingEntry>,
    /// `RTM_NEWNEIGH` bodies: permanent neighbours, proxies, forwarding entries.
    #[prost(bytes = "vec", repeated, tag = "5")]
    pub neighbours: Vec<Vec<u8>>,
    /// `RTM_NEWNEXTHOP` bodies.
    #[prost(bytes = "vec", repeated, tag = "6")]
    pub nexthops: Vec<Vec<u8>>,
    /// nftables, in the order in which they are made.
    #[prost(message, repeated, tag = "7")]
    pub nft: Vec<NftEntry>,
    /// Tables of iptables in its older form.
    #[prost(message, repeated, tag = "8")]
    pub xtables: Vec<XtableEntry>,
    /// Queueing disciplines, classes and filters.
    #[prost(message, repeated, tag = "9")]
    pub traffic: Vec<NftEntry>,
    /// It comes back with nothing but `lo`.
    #[prost(bool, tag = "10")]
    pub empty: bool,
    /// Name of the namespace that is to be used instead.
    #[prost(string, optional, tag = "11")]
    pub external: Option<String>,
}

/// A device.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LinkEntry {
    /// `RTM_NEWLINK` body: `struct ifinfomsg` and attributes.
    #[prost(bytes = "vec", tag = "1")]
    pub body: Vec<u8>,
    /// Where the device it is tied to (`IFLA_LINK`) is, if not here: the number
    /// of a namespace of the dump, or 0 for the host's.
    #[prost(uint32, optional, tag = "2")]
    pub tied_to: Option<u32>,
    /// The host's device it is tied to.
    #[prost(message, optional, tag = "3")]
    pub outside: Option<OutsideEntry>,
}

/// A device of the host.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct OutsideEntry {
    /// `RTM_NEWLINK` body.
    #[prost(bytes = "vec", tag = "1")]
    pub body: Vec<u8>,
    /// Name of the bridge it was a port of.
    #[prost(string, optional, tag = "2")]
    pub master: Option<String>,
    /// `RTM_NEWADDR` bodies.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub addresses: Vec<Vec<u8>>,
    /// `RTM_NEWROUTE` bodies.
    #[prost(bytes = "vec", repeated, tag = "4")]
    pub routes: Vec<Vec<u8>>,
}

/// The number one namespace gives another.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct NsidEntry {
    /// The other: the number of a namespace of the dump, or 0 for the host's.
    #[prost(uint32, tag = "1")]
    pub other: u32,
    /// What it is called here.
    #[prost(int32, tag = "2")]
    pub nsid: i32,
}

/// A sysctl.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SettingEntry {
    /// Path below its root.
    #[prost(string, tag = "1")]
    pub path: String,
    /// What reading it gave.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

/// A message and its type.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct NftEntry {
    /// Type of the message.
    #[prost(uint32, tag = "1")]
    pub kind: u32,
    /// Its body.
    #[prost(bytes = "vec", tag = "2")]
    pub body: Vec<u8>,
}

/// A table of iptables or ip6tables.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct XtableEntry {
    /// Whether it is of IPv6.
    #[prost(bool, tag = "1")]
    pub v6: bool,
    /// `struct ipt_getinfo`.
    #[prost(bytes = "vec", tag = "2")]
    pub info: Vec<u8>,
    /// The rules, as `IPT_SO_GET_ENTRIES` gives them.
    #[prost(bytes = "vec", tag = "3")]
    pub entries: Vec<u8>,
}
