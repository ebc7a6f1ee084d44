use vmm_sys_util::tempdir::TempDir;

use super::*;

fn refusal(json: &str) -> String {
    serde_json::from_str::<CpuConfig>(json).unwrap_err().to_string()
}

fn bitmap<T: TryFrom<u64>>(text: &str) -> Result<Bitmap<T>, serde_json::Error> {
    serde_json::from_value(text.into())
}

#[test]
fn reads_every_kind_of_change() {
    let json = r#"{
        "kvm_capabilities": ["121", "!56"],
        "cpuid_modifiers": [{"leaf": "0x7", "subleaf": "0b1", "flags": 1, "comment": "ignored",
            "modifiers": [{"register": "ebx", "bitmap": "0b01x"}]}],
        "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1_x0"}]
    }"#;
    let expected = CpuConfig {
        kvm_capabilities: vec![Capability::Required(121), Capability::Waived(56)],
        cpuid_modifiers: vec![CpuidModifier {
            leaf: 7,
            subleaf: 1,
            flags: 1,
            modifiers: vec![RegisterModifier {
                register: Register::Ebx,
                bitmap: Bitmap {
                    mask: 0b110,
                    value: 0b010,
                },
            }],
        }],
        msr_modifiers: vec![MsrModifier {
            addr: 0x10a,
            bitmap: Bitmap {
                mask: 0b101,
                value: 0b100,
            },
        }],
    };
    assert_eq!(serde_json::from_str::<CpuConfig>(json).unwrap(), expected);
    assert_eq!(
        serde_json::from_str::<CpuConfig>("{}").unwrap(),
        CpuConfig::default()
    );
}

#[test]
fn a_bitmap_changes_its_zeroes_and_ones_only() {
    let short: Bitmap<u32> = bitmap("0b01x").unwrap();
    assert_eq!([short.apply(0), short.apply(u32::MAX)], [0b010, 0xffff_fffb]);
    let whole: Bitmap<u32> = bitmap(&format!("0b1{}", "0".repeat(31))).unwrap();
    assert_eq!(whole.apply(u32::MAX), 1 << 31);
    let wide: Bitmap<u64> = bitmap(&format!("0b1{}", "x".repeat(63))).unwrap();
    assert_eq!(wide.apply(5), 1 << 63 | 5);
    let empty: Bitmap<u32> = bitmap("0b").unwrap();
    assert_eq!(empty.apply(7), 7);
}

#[test]
fn a_bitmap_has_at_most_the_bits_of_its_register() {
    let separated = format!("0b{}", ["xxxx"; 8].join("_"));
    assert!(bitmap::<u32>(&separated).is_ok());
    for digit in ["0", "1", "x"] {
        let message = bitmap::<u32>(&digit.repeat(33)).unwrap_err().to_string();
        assert!(message.contains("too long"), "{message}");
        assert!(bitmap::<u64>(&digit.repeat(65)).is_err());
    }
}

#[test]
fn refuses_malformed_values_in_the_known_words() {
    let leaf = |leaf: &str, bitmap: &str| {
        format!(
            r#"{{"cpuid_modifiers":[{{"leaf":"{leaf}","subleaf":"0x0","flags":0,"modifiers":[{{"register":"eax","bitmap":"{bitmap}"}}]}}]}}"#
        )
    };
    assert!(refusal(&leaf("zz", "0b1")).starts_with(
        "No supported number system prefix found in value [zz]. Make sure to prefix the number with '0x' for \
         hexadecimal numbers or '0b' for binary numbers. at line 1 column "
    ));
    assert!(refusal(&leaf("1", "0b1")).contains("No supported number system prefix"));
    assert!(
        refusal(&leaf("0x100000000", "0b1")).starts_with("Failed to parse string [0x100000000] as a number")
    );
    assert!(
        refusal(&leaf("0x1", "0bz"))
            .starts_with("Failed to parse string [0bz] as a bitmap - unknown character: 122 at line 1")
    );
    assert!(refusal(r#"{"kvm_capabilities":["x"]}"#).starts_with(
        "Failed to parse string [x] as a kvm capability - can not convert to numeric: invalid digit found in string"
    ));
    assert!(refusal(r#"{"kvm_capabilities":["!"]}"#).contains("[!]"));
    assert!(refusal(r#"{"kvm_capabilities":["!+1"]}"#).contains("invalid digit"));
    assert!(refusal(&leaf("0x+1", "0b1")).contains("invalid digit"));
    assert!(refusal(r#"{"reg_modifiers":[]}"#).starts_with("unknown field `reg_modifiers`, expected one of"));
    assert!(refusal(r#"{"msr_modifiers":[{"addr":"0x1"}]}"#).starts_with("missing field `bitmap`"));
}

#[test]
fn a_source_is_a_template_or_the_path_of_one() {
    let folder = TempDir::new().unwrap();
    let path = folder.as_path().join("template.json");
    std::fs::write(&path, r#"{"kvm_capabilities":["1"]}"#).unwrap();
    let read = |json: serde_json::Value| serde_json::from_value::<CpuConfigSource>(json).unwrap();
    let inline = read(serde_json::json!({"kvm_capabilities": ["1"]}));
    let named = read(path.to_str().unwrap().into());
    assert_eq!(named.load().unwrap(), inline.load().unwrap());
    std::fs::write(&path, "{").unwrap();
    let message = crate::error::chain(&named.load().unwrap_err());
    assert!(
        message.contains("template.json") && message.contains("EOF"),
        "{message}"
    );
}
