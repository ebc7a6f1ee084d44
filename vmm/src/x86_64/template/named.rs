//! The named templates, as tables: guests on different CPUs of one maker see the same one. `docs/cpu-templates.md` says
//! what each shows in words; a feature that no table names is hidden.

use kvm_bindings::kvm_cpuid_entry2;

use super::super::cpuid::Register::{self, Eax, Ebx, Ecx, Edx};
use super::super::cpuid::{Vendor, find};
use super::{ARCH_CAPABILITIES, TemplateError};
use crate::config::{Bitmap, CpuConfig, CpuTemplate, CpuidModifier, MsrModifier, RegisterModifier};

/// One register of a leaf and subleaf: the bits that stay as they are on the host, and the values of all others.
struct Row {
    leaf: u32,
    subleaf: u32,
    register: Register,
    keep: u32,
    value: u32,
}

/// A named template.
struct Table {
    vendor: Vendor,
    /// What the guest reads as its CPU's name.
    brand: &'static str,
    rows: &'static [&'static [Row]],
    /// IA32_ARCH_CAPABILITIES: the bits that stay, and the values of all others.
    arch_capabilities: Option<(u64, u64)>,
}

/// A row that hides all but these bits.
const fn only(leaf: u32, subleaf: u32, register: Register, bits: &[u32]) -> Row {
    Row {
        leaf,
        subleaf,
        register,
        keep: mask(bits),
        value: 0,
    }
}

/// A row that gives the whole register a value.
const fn set(leaf: u32, subleaf: u32, register: Register, value: u32) -> Row {
    Row {
        leaf,
        subleaf,
        register,
        keep: 0,
        value,
    }
}

const fn mask(bits: &[u32]) -> u32 {
    let (mut mask, mut index) = (0, 0);
    while index < bits.len() {
        mask |= 1 << bits[index];
        index += 1;
    }
    mask
}

/// What every table has: leaves up to 0xD, one subleaf of leaf 7, state of x87, SSE and AVX, the steadiness of the time
/// stamp counter, and AMD's controls of speculation, which KVM shows on Intel's CPUs too.
const COMMON: &[Row] = &[
    set(0x0, 0, Eax, 0xd),
    set(0x7, 0, Eax, 0),
    // x87, SSE, AVX, which take 832 bytes
    only(0xd, 0, Eax, &[0, 1, 2]),
    set(0xd, 0, Ecx, 832),
    set(0xd, 0, Edx, 0),
    set(0xd, 1, Ecx, 0),
    set(0xd, 1, Edx, 0),
    // INVARIANT_TSC
    only(0x8000_0007, 0, Edx, &[8]),
    // XSAVEERPTR; IBPB, IBRS, STIBP and their kin (14-19), SSBD and its kin (24-26), PSFD, BTC_NO, IBPB_RET
    only(
        0x8000_0008,
        0,
        Ebx,
        &[2, 12, 14, 15, 16, 17, 18, 19, 24, 25, 26, 28, 29, 30],
    ),
];

/// Leaves of Intel's CPUs: extended ones up to 0x8000_0008.
const INTEL: &[Row] = &[
    set(0x8000_0000, 0, Eax, 0x8000_0008),
    // SYSCALL, NX, PDPE1GB, RDTSCP, LM
    only(0x8000_0001, 0, Edx, &[11, 20, 26, 27, 29]),
];

/// The CPU of C3 instances, an Ivy Bridge (Xeon E5-2680 v2): AVX without AVX2.
const IVY_BRIDGE: &[Row] = &[
    set(0x1, 0, Eax, 0x0003_06e4),
    // SSE3, PCLMULQDQ, SSSE3, CX16, PCID, SSE4.1, SSE4.2, X2APIC, POPCNT, TSC_DEADLINE, AES, XSAVE, OSXSAVE, AVX, F16C,
    // RDRAND, HYPERVISOR
    only(
        0x1,
        0,
        Ecx,
        &[0, 1, 9, 13, 17, 19, 20, 21, 23, 24, 25, 26, 27, 28, 29, 30, 31],
    ),
    // FSGSBASE, TSC_ADJUST, FDP_EXCPTN_ONLY, SMEP, ERMS, ZERO_FCS_FDS
    only(0x7, 0, Ebx, &[0, 1, 6, 7, 9, 13]),
    set(0x7, 0, Ecx, 0),
    // XSAVEOPT
    only(0xd, 1, Eax, &[0]),
    // LAHF
    only(0x8000_0001, 0, Ecx, &[0]),
];

/// Leaf 1, ECX of Haswell, Cascade Lake and Milan: as Ivy Bridge's, and FMA, MOVBE.
const FMA_AND_MOVBE: Row = only(
    0x1,
    0,
    Ecx,
    &[
        0, 1, 9, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
    ],
);

/// The CPU of T2 instances, a Haswell (Xeon E5-2676 v3): AVX2 and BMI.
const HASWELL: &[Row] = &[
    set(0x1, 0, Eax, 0x0003_06f2),
    FMA_AND_MOVBE,
    // as Ivy Bridge's, and BMI1, AVX2, BMI2, INVPCID
    only(0x7, 0, Ebx, &[0, 1, 3, 5, 6, 7, 8, 9, 10, 13]),
    set(0x7, 0, Ecx, 0),
    // XSAVEOPT
    only(0xd, 1, Eax, &[0]),
    // LAHF, ABM (LZCNT)
    only(0x8000_0001, 0, Ecx, &[0, 5]),
];

/// What Cascade Lake and Milan have in common.
const SHARED: &[Row] = &[
    FMA_AND_MOVBE,
    // as Haswell's, and RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB
    only(0x7, 0, Ebx, &[0, 1, 3, 5, 6, 7, 8, 9, 10, 13, 18, 19, 20, 23, 24]),
    // UMIP
    only(0x7, 0, Ecx, &[2]),
    // XSAVEOPT, XSAVEC, XGETBV1, XSAVES
    only(0xd, 1, Eax, &[0, 1, 2, 3]),
];

const CASCADE_LAKE: &[Row] = &[
    set(0x1, 0, Eax, 0x0005_0657),
    // LAHF, ABM (LZCNT), PREFETCHW
    only(0x8000_0001, 0, Ecx, &[0, 5, 8]),
];

const MILAN: &[Row] = &[
    set(0x1, 0, Eax, 0x00a0_0f11),
    set(0x8000_0000, 0, Eax, 0x8000_0021),
    set(0x8000_0001, 0, Eax, 0x00a0_0f11),
    // LAHF, CMP_LEGACY, CR8_LEGACY, ABM (LZCNT), PREFETCHW, OSVW, TOPOEXT
    only(0x8000_0001, 0, Ecx, &[0, 1, 4, 5, 8, 9, 22]),
    // those that leaf 1 has too (0-9, 12-17, 23, 24), SYSCALL, NX, PDPE1GB, RDTSCP, LM
    only(
        0x8000_0001,
        0,
        Edx,
        &[
            0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 20, 23, 24, 26, 27, 29,
        ],
    ),
    // LFENCE_RDTSC, VERW_CLEAR, NULL_SEL_CLR_BASE, SBPB, IBPB_BRTYPE
    only(0x8000_0021, 0, Eax, &[2, 5, 6, 27, 28]),
];

/// Controls of speculation: MD_CLEAR, SPEC_CTRL, STIBP, L1D_FLUSH, SSBD.
const SPECULATION: &[Row] = &[only(0x7, 0, Edx, &[10, 26, 27, 28, 31])];
/// The same, and ARCH_CAPABILITIES, for the templates that set that register.
const SPECULATION_AND_CAPABILITIES: &[Row] = &[only(0x7, 0, Edx, &[10, 26, 27, 28, 29, 31])];

/// IA32_ARCH_CAPABILITIES: no immunity at all; RSBA and RRSBA, the weaknesses of any CPU of the range.
const SKYLAKE_OR_LATER: (u64, u64) = (0, 1 << 2 | 1 << 19);
/// RDCL_NO, IBRS_ALL, MDS_NO and PSCHANGE_MC_NO; RSBA, FB_CLEAR and RRSBA as the host has them.
const CASCADE_LAKE_OR_LATER: (u64, u64) = (1 << 2 | 1 << 17 | 1 << 19, 1 << 0 | 1 << 1 | 1 << 5 | 1 << 6);

const XEON: &str = "Intel(R) Xeon(R) Processor";
const EPYC: &str = "AMD EPYC";

fn table(template: CpuTemplate) -> Option<Table> {
    let intel = |rows, arch_capabilities| {
        Some(Table {
            vendor: Vendor::Intel,
            brand: XEON,
            rows,
            arch_capabilities,
        })
    };
    match template {
        CpuTemplate::None => None,
        CpuTemplate::C3 => intel(&[COMMON, INTEL, SPECULATION, IVY_BRIDGE], None),
        CpuTemplate::T2 => intel(&[COMMON, INTEL, SPECULATION, HASWELL], None),
        CpuTemplate::T2S => intel(
            &[COMMON, INTEL, SPECULATION_AND_CAPABILITIES, HASWELL],
            Some(SKYLAKE_OR_LATER),
        ),
        CpuTemplate::T2CL => intel(
            &[COMMON, INTEL, SPECULATION_AND_CAPABILITIES, SHARED, CASCADE_LAKE],
            Some(CASCADE_LAKE_OR_LATER),
        ),
        CpuTemplate::T2A => Some(Table {
            vendor: Vendor::Amd,
            brand: EPYC,
            rows: &[COMMON, SPECULATION, SHARED, MILAN],
            arch_capabilities: None,
        }),
    }
}

/// The template as changes of this baseline. What the host lacks is left out: there is nothing to hide.
pub fn named(template: CpuTemplate, baseline: &[kvm_cpuid_entry2]) -> Result<CpuConfig, TemplateError> {
    let Some(table) = table(template) else {
        return Ok(CpuConfig::default());
    };
    let found = Vendor::of(baseline);
    if found != table.vendor {
        return Err(TemplateError::Vendor {
            template,
            needed: table.vendor,
            found,
        });
    }
    let rows = table.rows.iter().copied().flatten().map(change);
    let changes = rows.chain(brand(table.brand)).chain(more_state(baseline));
    let cpuid_modifiers = changes
        .filter_map(|(leaf, subleaf, modifier)| {
            let entry = find(baseline, leaf, subleaf)?;
            Some(CpuidModifier {
                leaf,
                subleaf,
                flags: entry.flags,
                modifiers: vec![modifier],
            })
        })
        .collect();
    let msr_modifiers = table.arch_capabilities.map(|(keep, value)| MsrModifier {
        addr: ARCH_CAPABILITIES,
        bitmap: Bitmap { mask: !keep, value },
    });
    Ok(CpuConfig {
        kvm_capabilities: Vec::new(),
        cpuid_modifiers,
        msr_modifiers: msr_modifiers.into_iter().collect(),
    })
}

/// Leaf, subleaf, and what changes there.
type Change = (u32, u32, RegisterModifier);

fn change(row: &Row) -> Change {
    let bitmap = Bitmap {
        mask: !row.keep,
        value: row.value,
    };
    let register = row.register;
    (row.leaf, row.subleaf, RegisterModifier { register, bitmap })
}

/// The CPU's name, in 48 bytes over three leaves.
fn brand(name: &str) -> impl Iterator<Item = Change> {
    let mut bytes = [0; 48];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    let places =
        (0x8000_0002..=0x8000_0004).flat_map(|leaf| [Eax, Ebx, Ecx, Edx].map(|register| (leaf, register)));
    let words = bytes
        .as_chunks::<4>()
        .0
        .to_vec()
        .into_iter()
        .map(u32::from_le_bytes);
    places
        .zip(words)
        .map(|((leaf, register), value)| change(&set(leaf, 0, register, value)))
}

/// Clears the subleaves of leaf 0xD that describe state beyond AVX.
fn more_state(baseline: &[kvm_cpuid_entry2]) -> impl Iterator<Item = Change> {
    baseline
        .iter()
        .filter(|entry| entry.function == 0xd && entry.index > 2)
        .flat_map(|entry| [Eax, Ebx, Ecx, Edx].map(|register| change(&set(0xd, entry.index, register, 0))))
}

#[cfg(test)]
mod tests;
