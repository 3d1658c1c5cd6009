//! Everything about a load, worked out before any system call.

use std::borrow::Cow;
use std::ops::Range;

use crate::boot_params::{self, E820_MAX, Pointers};
use crate::bzimage::BzImage;
use crate::e820::{self, Entry, Kind};
use crate::machine::{BOOT_PARAMS_LEN, Machine};
use crate::place::Free;
use crate::setup_data::{self, Chain};

const PAGE: u64 = 4096;
/// Firmware, real-mode code and other old things live below.
const FIRST_MIB: u64 = 1 << 20;
/// Kernels do not like to be below.
const KERNEL_START: u64 = 16 << 20;
const FOUR_GIB: u64 = 4 << 30;
/// With more, the kernel's own table overflows once it has split entries.
const MAP_ENTRIES_MAX: usize = 1500;

/// What to load.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The kernel.
    pub kernel: &'a BzImage,
    /// Its initrd; empty for none.
    pub initrd: &'a [u8],
    /// Its command line.
    pub command_line: &'a str,
    /// Physical memory that the next kernel is told to be soft reserved, and that
    /// nothing is loaded to. Must be RAM.
    pub hand_over: &'a [Range<u64>],
    /// Physical memory that this kernel was told to be soft reserved and that is RAM
    /// for the next one, unless handed over again.
    pub returned: &'a [Range<u64>],
    /// A setup_data node that the next kernel shows to user space: type and content.
    pub blob: Option<(u32, &'a [u8])>,
}

/// One piece of memory to be filled at the jump.
#[derive(Debug, Clone)]
pub struct Segment<'a> {
    /// What it is, for messages.
    pub name: &'static str,
    /// Physical address.
    pub address: u64,
    /// Bytes of memory, whole pages; zeroed behind the content.
    pub memory_len: u64,
    /// Its content.
    pub bytes: Cow<'a, [u8]>,
}

/// A load, ready for [`crate::load`].
#[derive(Debug, Clone)]
pub struct Plan<'a> {
    /// Physical address where the processor starts.
    pub entry: u64,
    /// What goes where, ascending and apart.
    pub segments: Vec<Segment<'a>>,
    /// The next kernel's memory map.
    pub memory_map: Vec<Entry>,
}

/// Why a load cannot be planned.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The command line is longer than the kernel takes.
    #[error("the command line has {len} bytes; the kernel takes {max}")]
    CommandLineTooLong {
        /// Its bytes.
        len: usize,
        /// What the kernel takes.
        max: usize,
    },
    /// The command line would end early.
    #[error("the command line holds a NUL byte")]
    CommandLineNul,
    /// Memory to be handed over is not RAM.
    #[error("memory {:#x}-{:#x} cannot be handed over: it is not RAM", .range.start, .range.end)]
    NotRam {
        /// The memory.
        range: Range<u64>,
    },
    /// The memory map would be too long for the next kernel.
    #[error("the memory map has {entries} entries; at most {MAP_ENTRIES_MAX} are safe")]
    MapTooLong {
        /// Its entries.
        entries: usize,
    },
    /// Nowhere is room for a piece.
    #[error("there is no free stretch of {} MiB for the {name}", (.len >> 20) + 1)]
    NoRoom {
        /// The piece.
        name: &'static str,
        /// Its bytes.
        len: u64,
    },
}

impl<'a> Plan<'a> {
    /// Works out a load.
    ///
    /// # Errors
    /// Every [`PlanError`].
    pub fn new(machine: &Machine, request: &Request<'a>) -> Result<Plan<'a>, PlanError> {
        let kernel = request.kernel;
        let len = request.command_line.len();
        if len > kernel.command_line_max() {
            return Err(PlanError::CommandLineTooLong {
                len,
                max: kernel.command_line_max(),
            });
        }
        if request.command_line.contains('\0') {
            return Err(PlanError::CommandLineNul);
        }
        let memory_map = next_memory_map(machine, request)?;

        let mut avoid: Vec<Range<u64>> = vec![0..FIRST_MIB];
        avoid.extend(machine.crash_kernel.iter().cloned());
        avoid.extend(request.returned.iter().cloned());
        let mut free = Free::new(&e820::of_kind(&memory_map, Kind::Ram), &avoid);
        let kernel_at = place_kernel(&mut free, kernel)?;
        let initrd_at = place_initrd(&mut free, kernel, request.initrd.len() as u64)?;
        let parameters = Parameters::new(machine, request, &memory_map);
        let parameters_at = place_below_4g_first("boot parameters", parameters.len(), &mut free)?;
        let initrd = initrd_at..initrd_at + request.initrd.len() as u64;

        let mut segments = vec![
            Segment {
                name: "kernel",
                address: kernel_at,
                memory_len: kernel.init_size().next_multiple_of(PAGE),
                bytes: Cow::Borrowed(kernel.payload()),
            },
            Segment {
                name: "boot parameters",
                address: parameters_at,
                memory_len: parameters.len().next_multiple_of(PAGE),
                bytes: Cow::Owned(parameters.encode(
                    machine,
                    kernel,
                    kernel_at,
                    &initrd,
                    parameters_at,
                )),
            },
        ];
        if !initrd.is_empty() {
            segments.push(Segment {
                name: "initrd",
                address: initrd_at,
                memory_len: (request.initrd.len() as u64).next_multiple_of(PAGE),
                bytes: Cow::Borrowed(request.initrd),
            });
        }
        segments.sort_by_key(|segment| segment.address);
        Ok(Plan {
            entry: parameters_at + parameters.trampoline_at() as u64,
            segments,
            memory_map,
        })
    }
}

fn next_memory_map(machine: &Machine, request: &Request<'_>) -> Result<Vec<Entry>, PlanError> {
    let map = e820::convert(
        &machine.memory_map,
        request.returned,
        Kind::SoftReserved,
        Kind::Ram,
    );
    let ram = e820::of_kind(&map, Kind::Ram);
    let not_ram = e820::subtract(request.hand_over, &ram);
    if let Some(range) = not_ram.into_iter().next() {
        return Err(PlanError::NotRam { range });
    }
    let map = e820::convert(&map, request.hand_over, Kind::Ram, Kind::SoftReserved);
    if map.len() > MAP_ENTRIES_MAX {
        return Err(PlanError::MapTooLong { entries: map.len() });
    }
    Ok(map)
}

fn place_kernel(free: &mut Free, kernel: &BzImage) -> Result<u64, PlanError> {
    let len = kernel.init_size().next_multiple_of(PAGE);
    let preferred = kernel.pref_address();
    let place = if kernel.is_relocatable() {
        let end = if kernel.may_lie_above_4g() {
            u64::MAX
        } else {
            FOUR_GIB
        };
        free.take_lowest(
            len,
            kernel.alignment().max(PAGE),
            preferred.max(KERNEL_START)..end,
        )
    } else {
        free.take_lowest(len, PAGE, preferred..preferred.saturating_add(len))
            .filter(|at| *at == preferred)
    };
    place.ok_or(PlanError::NoRoom {
        name: "kernel",
        len,
    })
}

fn place_initrd(free: &mut Free, kernel: &BzImage, len: u64) -> Result<u64, PlanError> {
    if len == 0 {
        return Ok(0);
    }
    if kernel.may_lie_above_4g() {
        return place_below_4g_first("initrd", len, free);
    }
    free.take_highest(len, PAGE, 0..FOUR_GIB)
        .ok_or(PlanError::NoRoom {
            name: "initrd",
            len,
        })
}

fn place_below_4g_first(name: &'static str, len: u64, free: &mut Free) -> Result<u64, PlanError> {
    free.take_highest(len, PAGE, 0..FOUR_GIB)
        .or_else(|| free.take_highest(len, PAGE, FOUR_GIB..u64::MAX))
        .ok_or(PlanError::NoRoom { name, len })
}

/// The one segment that holds all small things:
/// boot_params, command line, setup_data, EFI's memory map, trampoline.
struct Parameters {
    command_line: Vec<u8>,
    chain: Chain,
    efi_map: Vec<u8>,
    memory_map: Vec<Entry>,
}

const TRAMPOLINE_LEN: usize = 22;
const PIECE_ALIGN: usize = 16;

impl Parameters {
    fn new(machine: &Machine, request: &Request<'_>, memory_map: &[Entry]) -> Parameters {
        let mut chain = Chain::default();
        if memory_map.len() > E820_MAX {
            let rest = memory_map[E820_MAX..]
                .iter()
                .flat_map(|entry| entry.encode())
                .collect();
            chain.push(setup_data::E820_EXT, rest);
        }
        chain.push(setup_data::RNG_SEED, machine.rng_seed.to_vec());
        if let Some(efi) = &machine.efi {
            chain.push(setup_data::EFI, efi.setup_data());
        }
        if let Some((kind, blob)) = request.blob {
            chain.push(kind, blob.to_vec());
        }
        let mut command_line = request.command_line.as_bytes().to_vec();
        command_line.push(0);
        Parameters {
            command_line,
            chain,
            efi_map: machine
                .efi
                .as_ref()
                .map(|efi| efi.memory_map())
                .unwrap_or_default(),
            memory_map: memory_map.to_vec(),
        }
    }

    fn chain_at(&self) -> usize {
        (BOOT_PARAMS_LEN + self.command_line.len()).next_multiple_of(PIECE_ALIGN)
    }

    fn efi_map_at(&self) -> usize {
        (self.chain_at() + self.chain.len()).next_multiple_of(PIECE_ALIGN)
    }

    fn trampoline_at(&self) -> usize {
        (self.efi_map_at() + self.efi_map.len()).next_multiple_of(PIECE_ALIGN)
    }

    fn len(&self) -> u64 {
        (self.trampoline_at() + TRAMPOLINE_LEN) as u64
    }

    fn encode(
        &self,
        machine: &Machine,
        kernel: &BzImage,
        kernel_at: u64,
        initrd: &Range<u64>,
        at: u64,
    ) -> Vec<u8> {
        let efi_map = at + self.efi_map_at() as u64;
        let pointers = Pointers {
            kernel: kernel_at,
            command_line: at + BOOT_PARAMS_LEN as u64,
            initrd: initrd.clone(),
            setup_data: at + self.chain_at() as u64,
            efi_map: efi_map..efi_map + self.efi_map.len() as u64,
        };
        let mut out = boot_params::build(machine, kernel, &self.memory_map, &pointers);
        out.extend(&self.command_line);
        out.resize(self.chain_at(), 0);
        out.extend(self.chain.encode(pointers.setup_data));
        out.resize(self.efi_map_at(), 0);
        out.extend(&self.efi_map);
        out.resize(self.trampoline_at(), 0);
        out.extend(trampoline(at, BzImage::entry(kernel_at)));
        out
    }
}

/// `movabs $boot_params,%rsi; movabs $entry,%rax; jmp *%rax`: the 64-bit boot
/// protocol's way in, from the state that kexec leaves the processor in.
fn trampoline(boot_params: u64, entry: u64) -> [u8; TRAMPOLINE_LEN] {
    let mut code = [0; TRAMPOLINE_LEN];
    code[..2].copy_from_slice(&[0x48, 0xbe]);
    code[2..10].copy_from_slice(&boot_params.to_le_bytes());
    code[10..12].copy_from_slice(&[0x48, 0xb8]);
    code[12..20].copy_from_slice(&entry.to_le_bytes());
    code[20..].copy_from_slice(&[0xff, 0xe0]);
    code
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
