//! Where the fields of the running kernel's structures are: its own
//! description of its types (`/sys/kernel/btf/vmlinux`, the kernel's
//! Documentation/bpf/btf.rst).

use std::path::Path;

use nix::errno::Errno;

use crate::sys::{SysError, SysResult};

const PATH: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
/// How deep structures without a name lie in each other, and types stand for
/// others: more is no kernel's.
const DEPTH: usize = 32;

// Kinds of types.
const INT: u32 = 1;
const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const FLOAT: u32 = 16;
const DECL_TAG: u32 = 17;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// A field inside of a structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Bytes from the structure's start.
    pub offset: u32,
    /// Its length in bytes; of a bit field, of what holds it.
    pub bytes: u32,
    /// Lowest bit and number of bits, for bit fields.
    pub bits: Option<(u32, u32)>,
}

/// The types of the running kernel.
#[derive(Debug)]
pub struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
    /// Where each type begins; the first is number 1.
    starts: Vec<u32>,
}

/// One type's head.
struct Type<'a> {
    name: u32,
    kind: u32,
    count: u32,
    flag: bool,
    size: u32,
    rest: &'a [u8],
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}

impl Btf {
    /// Reads those of the running kernel.
    pub fn load() -> SysResult<Self> {
        let failed = |e: Errno| SysError::new("read", PATH, e);
        let bytes = std::fs::read(Path::new(PATH)).map_err(|e| {
            let errno = e.raw_os_error().unwrap_or(libc::EIO);
            failed(Errno::from_raw(errno))
        })?;
        Self::parse(&bytes).ok_or_else(|| failed(Errno::EBADMSG))
    }

    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let magic = u16::from_le_bytes(bytes.get(..2)?.try_into().ok()?);
        let head = word(bytes, 4)? as usize;
        let part = |at: usize, len: usize| {
            let start = head.checked_add(word(bytes, at)? as usize)?;
            bytes.get(start..start.checked_add(word(bytes, len)? as usize)?)
        };
        let (types, strings) = (part(8, 12)?, part(16, 20)?);
        if magic != MAGIC {
            return None;
        }
        let mut btf = Self {
            types: types.to_vec(),
            strings: strings.to_vec(),
            starts: Vec::new(),
        };
        let mut at = 0;
        while at < types.len() {
            btf.starts.push(at as u32);
            let t = btf.read(at)?;
            let per = match t.kind {
                INT | VAR | DECL_TAG => 4,
                ARRAY => 12,
                STRUCT | UNION | DATASEC | ENUM64 => 12 * t.count as usize,
                ENUM | FUNC_PROTO => 8 * t.count as usize,
                _ => 0,
            };
            at = at.checked_add(12)?.checked_add(per)?;
        }
        (at == types.len()).then_some(btf)
    }

    fn read(&self, at: usize) -> Option<Type<'_>> {
        let info = word(&self.types, at + 4)?;
        Some(Type {
            name: word(&self.types, at)?,
            kind: info >> 24 & 0x1f,
            count: info & 0xffff,
            flag: info >> 31 != 0,
            size: word(&self.types, at + 8)?,
            rest: self.types.get(at + 12..)?,
        })
    }

    fn get(&self, id: u32) -> Option<Type<'_>> {
        let n = (id as usize).checked_sub(1)?;
        self.read(*self.starts.get(n)? as usize)
    }

    fn is_named(&self, offset: u32, name: &str) -> bool {
        let from = self.strings.get(offset as usize..).unwrap_or_default();
        from.strip_prefix(name.as_bytes())
            .is_some_and(|r| r.first() == Some(&0))
    }

    fn find(&self, kind: u32, name: &str) -> Option<u32> {
        let is = |id: &u32| {
            let t = self.get(*id);
            t.is_some_and(|t| t.kind == kind && self.is_named(t.name, name))
        };
        (1..=self.starts.len() as u32).find(is)
    }

    /// Number of a function.
    pub fn function(&self, name: &str) -> Option<u32> {
        self.find(FUNC, name)
    }

    /// Bytes of a structure.
    pub fn size(&self, structure: &str) -> Option<u32> {
        Some(self.get(self.find(STRUCT, structure)?)?.size)
    }

    /// Where a field of a structure is; `path` leads into structures inside of
    /// it with dots. `None`: this kernel has no such field.
    pub fn field(&self, structure: &str, path: &str) -> Option<Place> {
        let mut id = self.find(STRUCT, structure)?;
        let mut sum = 0;
        let mut place = None;
        for name in path.split('.') {
            let (p, next) = self.member(id, name, DEPTH)?;
            let offset = p.offset.checked_add(sum)?;
            (sum, id) = (offset, self.plain(next)?);
            place = Some(Place { offset, ..p });
        }
        place
    }

    /// A member and its type; those of structures without a name are members
    /// of what they are in.
    fn member(&self, id: u32, name: &str, depth: usize) -> Option<(Place, u32)> {
        let t = self.get(self.plain(id)?)?;
        if depth == 0 || ![STRUCT, UNION].contains(&t.kind) {
            return None;
        }
        for n in 0..t.count as usize {
            let at = |field: usize| word(t.rest, n * 12 + field * 4);
            let (called, of, bits) = (at(0)?, at(1)?, at(2)?);
            let (bit, width) = match t.flag {
                true => (bits & 0xff_ffff, bits >> 24),
                false => (bits, 0),
            };
            if self.is_named(called, name) {
                let bytes = self.bytes(of, DEPTH)?;
                let place = match width {
                    0 => (bit / 8, None),
                    // Of what holds it, as the compiler lays it out.
                    65.. => return None,
                    _ => {
                        let unit = bytes.checked_mul(8)?.max(8);
                        (bit / unit * bytes, Some((bit % unit, width)))
                    }
                };
                let (offset, bits) = place;
                return Some((
                    Place {
                        offset,
                        bytes,
                        bits,
                    },
                    of,
                ));
            }
            if self.is_named(called, "")
                && let Some((p, of)) = self.member(of, name, depth - 1)
            {
                let offset = p.offset.checked_add(bit / 8)?;
                return Some((Place { offset, ..p }, of));
            }
        }
        None
    }

    /// The type that another one stands for.
    fn plain(&self, mut id: u32) -> Option<u32> {
        for _ in 0..DEPTH {
            match self.get(id) {
                Some(t) if is_alias(t.kind) => id = t.size,
                _ => return Some(id),
            }
        }
        None
    }

    fn bytes(&self, id: u32, depth: usize) -> Option<u32> {
        let t = self.get(self.plain(id)?)?;
        match t.kind {
            INT | STRUCT | UNION | ENUM | ENUM64 | FLOAT => Some(t.size),
            PTR => Some(8),
            ARRAY if depth > 0 => {
                let one = self.bytes(word(t.rest, 0)?, depth - 1)?;
                one.checked_mul(word(t.rest, 8)?)
            }
            _ => None,
        }
    }
}

fn is_alias(kind: u32) -> bool {
    [TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG].contains(&kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct s { int a; union { long b; struct { short c; int d: 3; }; }; }`
    fn made_up() -> Vec<u8> {
        let strings = b"\0int\0s\0a\0b\0c\0d\0long\0short\0";
        let at = |name: &str| {
            let name = [b"\0", name.as_bytes(), b"\0"].concat();
            let found = strings.windows(name.len()).position(|w| w == name);
            found.unwrap() as u32 + 1
        };
        let mut types: Vec<u32> = Vec::new();
        for (name, bytes) in [("int", 4), ("long", 8), ("short", 2)] {
            types.extend([at(name), INT << 24, bytes, 0]);
        }
        types.extend([0, STRUCT << 24 | 2 | 1 << 31, 8]);
        types.extend([at("c"), 3, 0, at("d"), 1, 33 | 3 << 24]);
        types.extend([0, UNION << 24 | 2, 8, at("b"), 2, 0, 0, 4, 0]);
        types.extend([at("s"), STRUCT << 24 | 2, 16, at("a"), 1, 0, 0, 5, 64]);
        let types: Vec<u8> = types.into_iter().flat_map(u32::to_le_bytes).collect();
        let mut out = [0x9f, 0xeb, 1, 0].to_vec();
        let (t, s) = (types.len() as u32, strings.len() as u32);
        for w in [24, 0, t, t, s] {
            out.extend(u32::to_le_bytes(w));
        }
        [out, types, strings.to_vec()].concat()
    }

    #[test]
    fn fields_are_found_through_nameless_structures() {
        let btf = Btf::parse(&made_up()).unwrap();
        let place = |offset, bytes, bits| {
            Some(Place {
                offset,
                bytes,
                bits,
            })
        };
        assert_eq!(btf.field("s", "a"), place(0, 4, None));
        assert_eq!(btf.field("s", "b"), place(8, 8, None));
        assert_eq!(btf.field("s", "c"), place(8, 2, None));
        assert_eq!(btf.field("s", "d"), place(12, 4, Some((1, 3))));
        assert_eq!(btf.field("s", "e"), None);
    }

    #[test]
    fn torn_ones_are_refused() {
        let whole = made_up();
        for len in 0..whole.len() {
            assert!(Btf::parse(&whole[..len]).is_none(), "{len} bytes");
        }
    }

    proptest::proptest! {
        #[test]
        fn never_panics(at in 0..200usize, byte in proptest::num::u8::ANY) {
            let mut bytes = made_up();
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Some(btf) = Btf::parse(&bytes) {
                let _ = (btf.field("s", "a"), btf.field("s", "d"), btf.field("s", "b.x"));
            }
        }
    }
}
