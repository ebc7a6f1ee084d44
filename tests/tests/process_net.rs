//! Network cards of a running machine whose guest is a few instructions: changes of link and tap over the API.

use std::net::Ipv4Addr;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Instant;

use mayfly_tests::{HOST_TIMEOUT, MonitorBuilder, Net, Result, Scratch, Tap, TestVm, TinyKernel, Vm};
use serde_json::{Value, json};

fn start(name: &str, nets: impl IntoIterator<Item = Net>) -> Result<Vm> {
    start_with(name, nets, |vm| vm)
}

fn start_with(
    name: &str,
    nets: impl IntoIterator<Item = Net>,
    customize: impl FnOnce(TestVm) -> TestVm,
) -> Result<Vm> {
    let scratch = Scratch::new(name)?;
    let kernel = TinyKernel::new().print("up\n").halt().write(&scratch)?;
    let vm = TestVm::new(name).kernel(kernel);
    let vm = customize(nets.into_iter().fold(vm, TestVm::net)).start()?;
    assert!(vm.console().wait_for("up\n", Instant::now() + HOST_TIMEOUT));
    Ok(vm)
}

fn patch(vm: &Vm, id: &str, mut fields: Value) -> Result {
    fields["iface_id"] = id.into();
    let path = format!("/network-interfaces/{id}");
    vm.patch(&path, &fields)?.success().map(drop)
}

fn refusal(vm: &Vm, id: &str, mut fields: Value) -> Result<String> {
    fields["iface_id"] = id.into();
    vm.patch(&format!("/network-interfaces/{id}"), &fields)?.fault()
}

/// The cards as the API shows them.
fn shown(vm: &Vm) -> Result<String> {
    Ok(vm.get("/vm/config")?.json()?["network-interfaces"].to_string())
}

fn tap(number: u8) -> Result<Tap> {
    Tap::create(&format!("mfpnet{number}"), Ipv4Addr::new(10, 78, number, 1))
}

/// Whether somebody has the tap open.
fn is_taken(tap: &Tap) -> Result<bool> {
    let state = std::fs::read_to_string(format!("/sys/class/net/{}/carrier", tap.name()))?;
    Ok(state.trim() == "1")
}

#[test]
fn a_card_without_a_link_state_is_shown_as_clients_know_it() -> Result {
    let tap = tap(1)?;
    let vm = start("net-shown", [Net::new("net0", &tap)])?;
    let plain = r#"[{"iface_id":"net0","host_dev_name":"mfpnet1","guest_mac":null,"mtu":null,"rx_rate_limiter":null,"tx_rate_limiter":null}]"#;
    let body = vm.get("/vm/config")?.body;
    assert!(body.contains(plain), "{body}");

    patch(&vm, "net0", json!({"link_state": "down"}))?;
    let body = vm.get("/vm/config")?.body;
    assert!(
        body.contains(r#""tx_rate_limiter":null,"link_state":"down"}]"#),
        "{body}"
    );
    patch(&vm, "net0", json!({"link_state": "up"}))?;
    assert!(shown(&vm)?.contains(r#""link_state":"up""#));
    Ok(())
}

#[test]
fn a_card_moves_to_another_tap_and_lets_go_of_its_own() -> Result {
    let (old, new) = (tap(2)?, tap(3)?);
    let vm = start("net-move", [Net::new("net0", &old)])?;
    assert!(is_taken(&old)? && !is_taken(&new)?);
    patch(&vm, "net0", json!({"host_dev_name": new.name()}))?;
    assert!(!is_taken(&old)? && is_taken(&new)?);
    assert!(shown(&vm)?.contains(r#""host_dev_name":"mfpnet3""#));
    // To where it is already.
    patch(&vm, "net0", json!({"host_dev_name": new.name()}))?;
    patch(&vm, "net0", json!({"host_dev_name": old.name()}))?;
    assert!(is_taken(&old)? && !is_taken(&new)?);
    Ok(())
}

#[test]
fn a_tap_that_cannot_be_had_leaves_everything_as_it_was() -> Result {
    let (own, others) = (tap(4)?, tap(5)?);
    let vm = start("net-busy", [Net::new("net0", &own), Net::new("net1", &others)])?;
    let before = shown(&vm)?;
    let limit = json!({"ops": {"size": 1, "refill_time": 1000}});
    for (name, reason) in [
        (
            others.name(),
            "the tap 'mfpnet5' is already used by interface 'net1'",
        ),
        ("lo", "'lo' is not a single-queue tap"),
        ("not a name", "'not a name' is not an interface name"),
    ] {
        let fields = json!({"host_dev_name": name, "link_state": "down", "tx_rate_limiter": limit});
        let fault = refusal(&vm, "net0", fields)?;
        assert!(fault.contains(reason), "{name}: {fault}");
        assert_eq!(shown(&vm)?, before);
        assert!(is_taken(&own)? && is_taken(&others)?);
    }
    Ok(())
}

#[test]
fn two_cards_cannot_have_one_tap() -> Result {
    let (own, other) = (tap(12)?, tap(13)?);
    let card = |id: &str, tap: &Tap| json!({"iface_id": id, "host_dev_name": tap.name()});
    let monitor = MonitorBuilder::new("net-twins")?.start()?;
    let put = |id: &str, tap: &Tap| monitor.put(&format!("/network-interfaces/{id}"), &card(id, tap));
    let words = ["the tap 'mfpnet12' is already used by interface 'net0'"];
    put("net0", &own)?.success()?;
    put("net0", &own)?.success()?;
    put("net1", &own)?.assert_refused(&words);
    put("net1", &other)?.success()?;
    put("net1", &own)?.assert_refused(&words);
    let config = monitor.get("/vm/config")?.json()?;
    assert_eq!(config["network-interfaces"][1]["host_dev_name"], other.name());

    // What comes later is checked too.
    drop(monitor);
    let vm = start("net-twins", [Net::new("net0", &own)])?;
    vm.put("/network-interfaces/net1", &card("net1", &own))?
        .assert_refused(&words);
    Ok(())
}

#[test]
fn a_link_is_up_or_down() -> Result {
    let tap = tap(6)?;
    let vm = start("net-link", [Net::new("net0", &tap).with("link_state", "down")])?;
    assert!(shown(&vm)?.contains(r#""link_state":"down""#));
    let fault = refusal(&vm, "net0", json!({"link_state": "Down"}))?;
    assert!(
        fault.contains("unknown variant `Down`, expected `up` or `down`"),
        "{fault}"
    );
    let fault = refusal(&vm, "net1", json!({"link_state": "down"}))?;
    assert!(fault.contains("there is no device 'net1'"), "{fault}");
    Ok(())
}

/// The number under which an open tap is passed on.
const FD: i32 = 50;

#[test]
fn a_card_takes_a_tap_that_the_process_inherited() -> Result {
    let (tap, other) = (tap(7)?, tap(8)?);
    let card = Net::unnamed("net0").with("host_fd", FD);
    let file = tap.open()?;
    let vm = start_with("net-fd", [card], |vm| vm.inherit(file, FD))?;
    assert!(is_taken(&tap)?);
    assert!(shown(&vm)?.contains(r#""host_fd":50"#));

    let delete = vm.request("DELETE", "/network-interfaces/net0", r#"{"force":true}"#)?;
    delete.success()?;
    let again = json!({"iface_id": "net0", "host_fd": FD});
    vm.put("/network-interfaces/net0", &again)?.success()?;

    patch(&vm, "net0", json!({"host_dev_name": other.name()}))?;
    assert!(is_taken(&other)?);
    let shown = shown(&vm)?;
    assert!(
        shown.contains(r#""host_dev_name":"mfpnet8""#) && !shown.contains("host_fd"),
        "{shown}"
    );
    Ok(())
}

#[test]
fn a_descriptor_that_is_no_tap_of_its_own_is_refused() -> Result {
    let tap = tap(9)?;
    let builder = MonitorBuilder::new("net-fd-bad")?.inherit(tap.open()?.into(), FD);
    let monitor = builder.start()?;
    let put = |id: &str, fields: &str| {
        let body = format!(r#"{{"iface_id":"{id}",{fields}}}"#);
        monitor.request("PUT", &format!("/network-interfaces/{id}"), &body)
    };
    put("net0", r#""host_fd":50"#)?.success()?;
    put("net0", r#""host_fd":50"#)?.success()?;
    let refused = [
        (
            r#""host_fd":50"#,
            "host_fd 50 is already used by interface 'net0'",
        ),
        (r#""host_fd":51"#, "host_fd 51 is not open"),
        (r#""host_fd":0"#, "host_fd 0 is no tap"),
        (r#""host_fd":-1"#, "host_fd -1 is not open"),
        (
            r#""host_fd":51,"host_dev_name":"tap0""#,
            "has not one end on the host",
        ),
        (
            r#""host_fd":null"#,
            "missing field `host_dev_name` at line 1 column 34",
        ),
    ];
    for (fields, words) in refused {
        put("net1", fields)?.assert_refused(&[words]);
    }
    Ok(())
}

/// A card on the program that listens at `socket`.
fn on_passt(socket: &Path) -> Net {
    let socket = socket.display().to_string();
    Net::unnamed("net0")
        .with("backend", "passt")
        .with("socket", socket)
}

#[test]
fn a_card_calls_passt_when_the_machine_starts() -> Result {
    let scratch = Scratch::new("net-passt")?;
    let socket = scratch.join("passt.sock");
    let listener = UnixListener::bind(&socket)?;
    listener.set_nonblocking(true)?;
    let vm = start("net-passt", [on_passt(&socket)])?;
    assert!(listener.accept().is_ok());
    assert!(listener.accept().is_err(), "passt was called more than once");
    let expected = format!(r#""backend":"passt","socket":"{}"}}]"#, socket.display());
    let body = vm.get("/vm/config")?.body;
    assert!(body.contains(&expected), "{body}");

    let fault = refusal(
        &vm,
        "net0",
        json!({"host_dev_name": "mfpnet0", "link_state": "down"}),
    )?;
    assert!(
        fault.contains("only an interface on a tap can move to another"),
        "{fault}"
    );
    assert!(!shown(&vm)?.contains("link_state"));
    patch(&vm, "net0", json!({"link_state": "down"}))
}

#[test]
fn a_start_without_passt_is_refused_and_can_be_tried_again() -> Result {
    let scratch = Scratch::new("net-no-passt")?;
    let kernel = TinyKernel::new().print("up\n").halt().write(&scratch)?;
    let socket = scratch.join("passt.sock");
    let monitor = MonitorBuilder::new("net-no-passt")?.start()?;
    monitor
        .put("/boot-source", &json!({"kernel_image_path": kernel}))?
        .success()?;
    let card = json!({"iface_id": "net0", "backend": "passt", "socket": socket});
    monitor.put("/network-interfaces/net0", &card)?.success()?;
    let start = json!({"action_type": "InstanceStart"});
    let refused = monitor.put("/actions", &start)?;
    refused.assert_refused(&["passt.sock': is passt running, with --socket and this path?"]);

    let listener = UnixListener::bind(&socket)?;
    monitor.action("InstanceStart")?;
    drop(listener);
    Ok(())
}

#[test]
fn a_card_without_one_end_is_refused() -> Result {
    let monitor = MonitorBuilder::new("net-ends")?.start()?;
    for (fields, words) in [
        (r#""backend":"passt""#, "missing field `socket`"),
        (r#""socket":"/tmp/s""#, "missing field `host_dev_name`"),
        (
            r#""backend":"passt","socket":"/tmp/s","host_fd":3"#,
            "has not one end on the host",
        ),
        (
            r#""backend":"slirp","socket":"/tmp/s""#,
            "unknown variant `slirp`, expected `tap` or `passt`",
        ),
    ] {
        let body = format!(r#"{{"iface_id":"net0",{fields}}}"#);
        monitor
            .request("PUT", "/network-interfaces/net0", &body)?
            .assert_refused(&[words]);
    }
    Ok(())
}

#[test]
fn vhost_is_there_or_the_remedy_is_named() -> Result {
    let tap = tap(10)?;
    let monitor = MonitorBuilder::new("net-vhost")?.start()?;
    let card = json!({"iface_id": "net0", "host_dev_name": tap.name(), "vhost": true});
    let answer = monitor.put("/network-interfaces/net0", &card)?;
    if Path::new("/dev/vhost-net").exists() {
        answer.success()?;
    } else {
        answer.assert_refused(&[
            "cannot use /dev/vhost-net",
            "modprobe vhost_net",
            "set vhost false",
        ]);
    }
    Ok(())
}

#[test]
fn vhost_goes_with_neither_limits_nor_metadata_nor_passt() -> Result {
    let tap = tap(11)?;
    let monitor = MonitorBuilder::new("net-vhost-not")?.start()?;
    let plain = json!({"iface_id": "net0", "host_dev_name": tap.name()});
    let with = |key: &str, value: Value| {
        let mut card = plain.clone();
        card["vhost"] = true.into();
        card[key] = value;
        card
    };
    let limit = json!({"ops": {"size": 1, "refill_time": 1000}});
    let refused = |card: &Value, words: &str| -> Result {
        let answer = monitor.put("/network-interfaces/net0", card)?;
        answer.assert_refused(&[words]);
        Ok(())
    };
    refused(
        &with("tx_rate_limiter", limit),
        "has vhost, where no rate limiter reaches",
    )?;
    refused(
        &with("vhost", json!(1)),
        "invalid type: integer `1`, expected a boolean",
    )?;
    let passt = json!({"iface_id": "net0", "backend": "passt", "socket": "/s", "vhost": true});
    refused(&passt, "has vhost, which needs a tap")?;

    monitor.put("/network-interfaces/net0", &plain)?.success()?;
    let mmds = json!({"network_interfaces": ["net0"], "version": "V2"});
    monitor.put("/mmds/config", &mmds)?.success()?;
    refused(
        &with("mtu", Value::Null),
        "has vhost, so it cannot serve metadata",
    )
}
