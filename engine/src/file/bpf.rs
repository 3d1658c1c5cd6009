//! BPF maps: hash tables and arrays, with what they hold.
//!
//! Maps that others hold, too (pinned ones, those of loaded programs), come
//! back as maps of their own: nothing tells who shares one.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use super::error::{BuildError, Stop, refuse};
use super::examined::{Examined, Saved};
use super::sys::{self, BpfMap};
use crate::image::schema::{BpfmapDataEntry, BpfmapFileEntry, FdTypes};
use crate::image::{
    ImageError, ImageSink, ImageSource, ImageWriter, Kind, get_reader, names, put_image,
};
use crate::sys::{SysError, SysResult};

/// `BPF_MAP_TYPE_HASH`, `BPF_MAP_TYPE_ARRAY`, `BPF_MAP_TYPE_LPM_TRIE`.
const KINDS: [u32; 3] = [1, 2, 11];
const BPF_F_RDONLY: u32 = 1 << 3;
const BPF_F_WRONLY: u32 = 1 << 4;
/// Most bytes of a map that are carried.
const BYTES_MAX: usize = 1 << 30;

/// Content of maps found while saving, by their numbers.
#[derive(Debug, Default)]
pub(crate) struct Maps {
    content: BTreeMap<u32, Content>,
}

#[derive(Debug, Default)]
struct Content {
    count: u32,
    keys: Vec<u8>,
    values: Vec<u8>,
}

/// Saves a descriptor of a map, and the map at its first.
pub(crate) fn save(file: &Examined<'_>, saved: &mut Saved, maps: &mut Maps) -> Result<(), Stop> {
    let word = |key: &str| -> Result<u64, SysError> {
        let value = file.info.other(key).unwrap_or_default();
        let number = match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => value.parse().ok(),
        };
        number.ok_or_else(|| SysError::new("fdinfo", key, nix::errno::Errno::ENODATA))
    };
    let map_type = word("map_type")? as u32;
    if !KINDS.contains(&map_type) {
        let reason = format!("it is of type {map_type}; hash tables and arrays are carried");
        return refuse("BPF map", reason, "untag the unit");
    }
    let map_id = word("map_id")? as u32;
    // Its own descriptor may not be allowed to read.
    let map = sys::bpf_map_by_id(map_id, 0)?;
    let (map_name, typed) = sys::bpf_map_name(map.as_fd())?;
    if typed {
        return refuse(
            "BPF map",
            "its types (BTF) are not carried",
            "untag the unit",
        );
    }
    let entry = BpfmapFileEntry {
        id: saved.entry.id,
        flags: file.flags(),
        pos: file.info.pos,
        fown: file.fown()?,
        map_type,
        key_size: word("key_size")? as u32,
        value_size: word("value_size")? as u32,
        map_id,
        max_entries: word("max_entries")? as u32,
        map_flags: word("map_flags")? as u32,
        memlock: word("memlock").unwrap_or(0),
        frozen: word("frozen")? != 0,
        map_name,
        ifindex: 0,
        mnt_id: None,
        map_extra: Some(word("map_extra").unwrap_or(0)),
    };
    if file.policy.payload && !maps.content.contains_key(&map_id) {
        let room = (entry.key_size as usize + entry.value_size as usize)
            .saturating_mul(entry.max_entries as usize);
        if room > BYTES_MAX {
            let reason = format!("it has room for {room} bytes, more than {BYTES_MAX}");
            return refuse("BPF map", reason, "untag the unit");
        }
        maps.content.insert(map_id, read(&map, &entry)?);
    }
    saved.entry.r#type = FdTypes::Bpfmap.into();
    saved.entry.bpf = Some(Box::new(entry));
    Ok(())
}

fn read(map: &OwnedFd, entry: &BpfmapFileEntry) -> SysResult<Content> {
    let (key_size, value_size) = (entry.key_size as usize, entry.value_size as usize);
    let mut content = Content::default();
    let mut key: Option<Vec<u8>> = None;
    // Others may put in more meanwhile than there was room for.
    while content.count < entry.max_entries {
        let next = sys::bpf_next_key(map.as_fd(), key.as_deref(), key_size)?;
        let Some(next) = next else { break };
        let value = sys::bpf_lookup(map.as_fd(), &next, value_size)?;
        content.keys.extend_from_slice(&next);
        content.values.extend_from_slice(&value);
        content.count += 1;
        key = Some(next);
    }
    Ok(content)
}

impl Maps {
    /// Writes what the maps hold.
    pub(crate) fn finish(self, sink: &mut dyn ImageSink) -> Result<(), ImageError> {
        if self.content.is_empty() {
            return Ok(());
        }
        let mut image = ImageWriter::new(Kind::BpfmapData);
        for (map_id, c) in &self.content {
            let head = BpfmapDataEntry {
                map_id: *map_id,
                keys_bytes: c.keys.len() as u32,
                values_bytes: c.values.len() as u32,
                count: c.count,
            };
            image.record(&head).payload(&c.keys).payload(&c.values);
        }
        put_image(sink, names::BPFMAP_DATA, &image.finish())
    }
}

/// Maps as they come back.
#[derive(Debug, Default)]
pub(crate) struct MapsBack {
    content: BTreeMap<u32, (Vec<u8>, Vec<u8>)>,
    made: BTreeMap<u32, OwnedFd>,
}

impl MapsBack {
    /// Reads what the maps held.
    pub(crate) fn load(source: &dyn ImageSource) -> Result<Self, ImageError> {
        let mut content = BTreeMap::new();
        if let Some(mut reader) = get_reader(source, Kind::BpfmapData, names::BPFMAP_DATA)? {
            while let Some(head) = reader.record::<BpfmapDataEntry>()? {
                let keys = reader.payload(head.keys_bytes.into())?.to_vec();
                let values = reader.payload(head.values_bytes.into())?.to_vec();
                content.insert(head.map_id, (keys, values));
            }
        }
        Ok(Self {
            content,
            made: BTreeMap::new(),
        })
    }

    /// Opens a map; it is made at its first descriptor.
    pub(crate) fn open(&mut self, entry: &BpfmapFileEntry) -> Result<OwnedFd, BuildError> {
        if !self.made.contains_key(&entry.map_id) {
            let map = self.make(entry)?;
            self.made.insert(entry.map_id, map);
        }
        let map = &self.made[&entry.map_id];
        let access = match entry.flags as i32 & libc::O_ACCMODE {
            libc::O_RDONLY => BPF_F_RDONLY,
            libc::O_WRONLY => BPF_F_WRONLY,
            _ => 0,
        };
        Ok(sys::bpf_map_by_id(number(map)?, access)?)
    }

    fn make(&self, entry: &BpfmapFileEntry) -> Result<OwnedFd, BuildError> {
        let map = sys::bpf_map_create(&BpfMap {
            kind: entry.map_type,
            key_size: entry.key_size,
            value_size: entry.value_size,
            max_entries: entry.max_entries,
            flags: entry.map_flags,
            extra: entry.map_extra.unwrap_or(0),
            name: entry.map_name.clone(),
        })?;
        if let Some((keys, values)) = self.content.get(&entry.map_id) {
            let (k, v) = (entry.key_size as usize, entry.value_size as usize);
            let fits = k > 0 && v > 0 && keys.len() % k == 0 && keys.len() / k * v == values.len();
            if !fits {
                let what = format!("content of BPF map {}", entry.map_id);
                return Err(BuildError::Images(what));
            }
            for (key, value) in keys.chunks_exact(k).zip(values.chunks_exact(v)) {
                sys::bpf_update(map.as_fd(), key, value)?;
            }
        }
        if entry.frozen {
            sys::bpf_freeze(map.as_fd())?;
        }
        Ok(map)
    }
}

/// A map's number in this kernel.
fn number(map: &OwnedFd) -> Result<u32, BuildError> {
    let path = format!("/proc/self/fdinfo/{}", std::os::fd::AsRawFd::as_raw_fd(map));
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let info = super::fdinfo::FdInfo::parse(&text).ok();
    let id = info.as_ref().and_then(|i| i.other("map_id")?.parse().ok());
    Ok(id.ok_or_else(|| SysError::new("fdinfo", path, nix::errno::Errno::ENODATA))?)
}
