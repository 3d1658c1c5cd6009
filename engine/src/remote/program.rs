//! Tables of system calls that a target executes for us.

/// A value a remote call takes as argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// A plain number (or an address that is valid in the target).
    Imm(u64),
    /// The result of an earlier call of the same program.
    Result(OpId),
    /// The address, in the target, of a piece of the program's data area.
    Data(DataRef),
}

/// Names one call of a [`Program`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpId(pub(crate) usize);

/// Names a piece of a [`Program`]'s data area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataRef {
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

impl From<u64> for Arg {
    fn from(v: u64) -> Self {
        Arg::Imm(v)
    }
}
impl From<i32> for Arg {
    fn from(v: i32) -> Self {
        Arg::Imm(v as i64 as u64)
    }
}
impl From<OpId> for Arg {
    fn from(v: OpId) -> Self {
        Arg::Result(v)
    }
}
impl From<DataRef> for Arg {
    fn from(v: DataRef) -> Self {
        Arg::Data(v)
    }
}

/// What to do when a call returns an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// The program stops; running it fails with the call's name and errno.
    Stop,
    /// The errno stands in the result (as `-errno`); the program goes on.
    Record,
}

/// One system call.
#[derive(Debug, Clone)]
pub struct Op {
    /// System call number.
    pub nr: i64,
    /// What this call is for, in error messages ("bind fd 7").
    pub what: String,
    /// Up to six arguments.
    pub args: Vec<Arg>,
    /// Behaviour on error.
    pub on_error: OnError,
}

/// A sequence of system calls and the data they use.
///
/// A program is plain data until an executor runs it in a stopped task.
#[derive(Debug, Default, Clone)]
pub struct Program {
    pub(crate) ops: Vec<Op>,
    pub(crate) data: Vec<u8>,
    /// (where in the data, what offset's address) pairs.
    pub(crate) pointers: Vec<(usize, usize)>,
}

impl Program {
    /// An empty program.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// The calls, in order.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Puts `bytes` into the data area (8-byte aligned).
    pub fn bytes(&mut self, bytes: &[u8]) -> DataRef {
        self.data.resize(self.data.len().next_multiple_of(8), 0);
        let offset = self.data.len();
        self.data.extend_from_slice(bytes);
        DataRef {
            offset,
            len: bytes.len(),
        }
    }

    /// Puts a NUL-terminated copy of `s` into the data area.
    pub fn cstr(&mut self, s: &[u8]) -> DataRef {
        let mut v = s.to_vec();
        v.push(0);
        self.bytes(&v)
    }

    /// Reserves `len` zero bytes in the data area, for a call to fill.
    pub fn zeroed(&mut self, len: usize) -> DataRef {
        self.bytes(&vec![0; len])
    }

    /// A part of a piece of the data area.
    pub fn part(&self, holder: DataRef, at: usize, len: usize) -> DataRef {
        assert!(at + len <= holder.len, "the part lies inside its holder");
        DataRef {
            offset: holder.offset + at,
            len,
        }
    }

    /// Overwrites part of a piece of the data area.
    pub fn write(&mut self, holder: DataRef, at: usize, bytes: &[u8]) {
        assert!(
            at + bytes.len() <= holder.len,
            "the bytes lie inside their holder"
        );
        let start = holder.offset + at;
        self.data[start..start + bytes.len()].copy_from_slice(bytes);
    }

    /// Makes the eight bytes at `at` within `holder` point to `target` once the
    /// program lies in a target (`struct sock_fprog`, `struct iovec`).
    pub fn point(&mut self, holder: DataRef, at: usize, target: DataRef) {
        assert!(at + 8 <= holder.len, "the pointer lies inside its holder");
        self.pointers.push((holder.offset + at, target.offset));
    }

    /// Adds a call whose failure stops the program.
    pub fn call(&mut self, nr: i64, what: impl Into<String>, args: &[Arg]) -> OpId {
        self.push(nr, what.into(), args, OnError::Stop)
    }

    /// Adds a call whose failure is only recorded.
    pub fn try_call(&mut self, nr: i64, what: impl Into<String>, args: &[Arg]) -> OpId {
        self.push(nr, what.into(), args, OnError::Record)
    }

    fn push(&mut self, nr: i64, what: String, args: &[Arg], on_error: OnError) -> OpId {
        assert!(args.len() <= 6, "a system call takes at most six arguments");
        self.ops.push(Op {
            nr,
            what,
            args: args.to_vec(),
            on_error,
        });
        OpId(self.ops.len() - 1)
    }
}

/// What a program left behind: every call's result and the data area.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub(crate) results: Vec<i64>,
    pub(crate) data: Vec<u8>,
}

impl Outcome {
    /// The raw result of a call: `-errno` on failure.
    pub fn result(&self, op: OpId) -> i64 {
        self.results[op.0]
    }

    /// A piece of the data area as the calls left it.
    pub fn data(&self, r: DataRef) -> &[u8] {
        &self.data[r.offset..r.offset + r.len]
    }
}
