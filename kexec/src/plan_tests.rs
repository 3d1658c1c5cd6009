use super::*;
use crate::bzimage::tests::sample as kernel_bytes;
use crate::machine::tests::sample as machine;
use crate::setup_data::tests::follow;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn kernel() -> BzImage {
    BzImage::parse(kernel_bytes()).unwrap()
}

fn request<'a>(kernel: &'a BzImage, initrd: &'a [u8]) -> Request<'a> {
    Request {
        kernel,
        initrd,
        command_line: "ro",
        hand_over: &[],
        returned: &[],
        blob: None,
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

fn place(segment: &Segment<'_>) -> Range<u64> {
    segment.address..segment.address + segment.memory_len
}

#[test]
fn a_plain_load_has_kernel_initrd_and_parameters() {
    let (kernel, initrd) = (kernel(), vec![7; 5000]);
    let plan = Plan::new(&machine(), &request(&kernel, &initrd)).unwrap();
    let names: Vec<_> = plan.segments.iter().map(|s| (s.name, s.address)).collect();
    assert_eq!(
        names,
        [
            ("kernel", 16 * MIB),
            ("boot parameters", 2047 * MIB - 4 * PAGE),
            ("initrd", 2047 * MIB - 2 * PAGE)
        ]
    );
    assert_eq!(plan.memory_map, machine().memory_map);
    assert!(place(&plan.segments[1]).contains(&plan.entry));
}

#[test]
fn the_kernel_finds_all_that_it_is_given() {
    let kernel = kernel();
    let hand_over = [4224 * MIB..4480 * MIB];
    let mut request = request(&kernel, b"initrd");
    request.hand_over = &hand_over;
    request.blob = Some((77, b"blob"));
    let plan = Plan::new(&machine(), &request).unwrap();
    let parameters = &plan.segments[1];
    let page = &parameters.bytes;
    let base = parameters.address;
    let u64_at = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    let nodes = follow(page, base, u64_at(0x250));
    assert_eq!(
        nodes,
        [(setup_data::RNG_SEED, vec![5; 32]), (77, b"blob".to_vec())]
    );
    assert_eq!(&page[0x1000..0x1003], b"ro\0");
    let code = &page[(plan.entry - base) as usize..];
    assert_eq!(code[..TRAMPOLINE_LEN], trampoline(base, 16 * MIB + 0x200));
    let soft = Entry {
        range: 4224 * MIB..4480 * MIB,
        kind: Kind::SoftReserved,
    };
    assert!(plan.memory_map.contains(&soft));
}

#[test]
fn a_long_map_continues_in_setup_data() {
    let kernel = kernel();
    let hand_over: Vec<_> = (0..100)
        .map(|n| (4098 + 4 * n) * MIB..(4100 + 4 * n) * MIB)
        .collect();
    let mut request = request(&kernel, b"initrd");
    request.hand_over = &hand_over;
    let plan = Plan::new(&machine(), &request).unwrap();
    assert_eq!(plan.memory_map.len(), 206);
    let parameters = &plan.segments[1];
    let first = u64::from_le_bytes(parameters.bytes[0x250..0x258].try_into().unwrap());
    let nodes = follow(&parameters.bytes, parameters.address, first);
    assert_eq!(nodes[0].0, setup_data::E820_EXT);
    assert_eq!(nodes[0].1.len(), 78 * 20);
    assert_eq!(nodes[0].1[..20], plan.memory_map[128].encode());
}

#[test]
fn a_chain_of_upgrades_gives_former_regions_back() {
    let mut machine = machine();
    let old = 4224 * MIB..4480 * MIB;
    machine.memory_map = e820::convert(
        &machine.memory_map,
        std::slice::from_ref(&old),
        Kind::Ram,
        Kind::SoftReserved,
    );
    let kernel = kernel();
    let (returned, hand_over) = ([old.clone()], [4352 * MIB..4608 * MIB]);
    let mut request = request(&kernel, b"initrd");
    request.hand_over = &hand_over;
    assert!(matches!(
        Plan::new(&machine, &request),
        Err(PlanError::NotRam { range }) if range == (4352 * MIB..4480 * MIB)
    ));
    request.returned = &returned;
    let plan = Plan::new(&machine, &request).unwrap();
    let high: Vec<_> = plan
        .memory_map
        .iter()
        .filter(|e| e.range.start >= 4096 * MIB)
        .collect();
    assert_eq!(high.len(), 3);
    assert_eq!(
        *high[0],
        Entry {
            range: 4096 * MIB..4352 * MIB,
            kind: Kind::Ram
        }
    );
    assert_eq!(
        *high[1],
        Entry {
            range: hand_over[0].clone(),
            kind: Kind::SoftReserved
        }
    );
}

#[test]
fn what_cannot_be_planned_is_said() {
    let kernel = kernel();
    let long = "x".repeat(2048);
    let with = |change: &dyn Fn(&mut Request<'_>)| {
        let mut request = request(&kernel, b"");
        change(&mut request);
        Plan::new(&machine(), &request)
    };
    assert_eq!(with(&|_| ()).unwrap().segments.len(), 2);
    let mut request = request(&kernel, b"");
    request.command_line = &long;
    let error = Plan::new(&machine(), &request).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the command line has 2048 bytes; the kernel takes 2047"
    );
    assert!(matches!(
        with(&|r| r.command_line = "a\0b"),
        Err(PlanError::CommandLineNul)
    ));
    let mut small = machine();
    small.memory_map.truncate(4);
    small.memory_map[3].range = MIB..64 * MIB;
    let request = Request {
        command_line: "",
        ..request
    };
    assert!(matches!(
        Plan::new(&small, &request),
        Err(PlanError::NoRoom { name: "kernel", .. })
    ));
}

proptest! {
    #[test]
    fn segments_keep_clear_of_everything(
        blocks in proptest::collection::btree_set(2u64..48, 0..20),
        crash in 0u64..1900,
        initrd_len in 0usize..3_000_000,
    ) {
        let mut machine = machine();
        machine.crash_kernel = vec![crash * MIB..(crash + 100) * MIB];
        let hand_over: Vec<Range<u64>> = blocks
            .into_iter()
            .map(|block| block * 128 * MIB..(block + 1) * 128 * MIB)
            .filter(|r| r.end <= 2047 * MIB || r.start >= 4096 * MIB)
            .collect();
        let (kernel, initrd) = (kernel(), vec![0; initrd_len]);
        let mut request = request(&kernel, &initrd);
        request.hand_over = &hand_over;
        if let Ok(plan) = Plan::new(&machine, &request) {
            let places: Vec<Range<u64>> = plan.segments.iter().map(place).collect();
            prop_assert!(places.windows(2).all(|pair| pair[0].end <= pair[1].start));
            for place in &places {
                prop_assert!(place.start >= FIRST_MIB && place.start % PAGE == 0);
                prop_assert!(!hand_over.iter().any(|r| overlap(r, place)));
                prop_assert!(!machine.crash_kernel.iter().any(|r| overlap(r, place)));
                let in_ram = |entry: &Entry| {
                    entry.kind == Kind::Ram
                        && entry.range.start <= place.start
                        && place.end <= entry.range.end
                };
                prop_assert!(plan.memory_map.iter().any(in_ram));
            }
            let soft: u64 = e820::of_kind(&plan.memory_map, Kind::SoftReserved)
                .iter()
                .map(|r| r.end - r.start)
                .sum();
            prop_assert_eq!(soft, hand_over.len() as u64 * 128 * MIB);
        }
    }
}
