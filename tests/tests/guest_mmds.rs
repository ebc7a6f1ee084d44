//! The metadata service as a Linux guest uses it: wget and nc through the card, beside ordinary traffic.

use mayfly_tests::network::Subnet;
use mayfly_tests::{Guest, Net, Result, Tap, TestVm, Vm};
use serde_json::{Value, json};

/// A machine whose card `net0` is on a tap of a network.
struct Machine {
    vm: Vm,
    subnet: Subnet,
    _tap: Tap,
}

/// Boots a machine with this service and, when there is room for it, with a long value in it.
fn boot(
    name: &str,
    subnet: Subnet,
    service: Value,
    customize: impl FnOnce(TestVm) -> TestVm,
) -> Result<Machine> {
    let tap = subnet.tap()?;
    let vm = TestVm::new(name)
        .args(["--http-api-max-payload-size", "300000"])
        .boot_arg(&subnet.boot_arg())
        .section("mmds-config", service)
        .config_file();
    let vm = customize(vm.net(Net::new("net0", &tap).with("mtu", 1400))).boot()?;
    let numbers: Vec<_> = (1..=30000).map(|number| number.to_string()).collect();
    let document = json!({
        "latest": {"meta-data": {"ami-id": "ami-1", "tags": {}}, "user-data": "#!/bin/sh\n"},
        "count": 3,
        "long": numbers.join(" "),
    });
    vm.put("/mmds", &document)?.success()?;
    Ok(Machine {
        vm,
        subnet,
        _tap: tap,
    })
}

/// What a guest prints that asks for a path, with these options of wget.
fn get(guest: &Guest, path: &str, options: &str) -> Result<String> {
    guest.check(&format!(
        "timeout 60 wget -q -O - {options} http://169.254.169.254{path}"
    ))
}

/// What a guest is told when it asks for a path that it does not get.
fn refused(guest: &Guest, path: &str, options: &str) -> Result<String> {
    let output = guest.run(&format!(
        "timeout 60 wget -O - {options} http://169.254.169.254{path} 2>&1"
    ))?;
    assert_ne!(output.code, 0, "{output:?}");
    Ok(output.stdout)
}

fn assert_documents_are_read(guest: &Guest) -> Result {
    assert_eq!(get(guest, "/", "")?, "count\nlatest/\nlong");
    assert_eq!(get(guest, "/latest/meta-data/", "")?, "ami-id\ntags/");
    assert_eq!(get(guest, "/latest/meta-data/ami-id", "")?, "ami-1");
    assert_eq!(get(guest, "/latest/user-data", "")?, "#!/bin/sh");
    let json = "--header 'Accept: application/json'";
    assert_eq!(
        get(guest, "/latest/meta-data", json)?,
        r#"{"ami-id":"ami-1","tags":{}}"#
    );
    assert_eq!(get(guest, "/count", json)?, "3");
    assert!(refused(guest, "/count", "")?.contains("501"));
    assert!(refused(guest, "/nope", "")?.contains("404"));
    Ok(())
}

/// A value of 168,893 bytes comes whole: once, and to ten programs at a time.
fn assert_long_values_come_whole(guest: &Guest) -> Result {
    guest.check("seq -s ' ' 1 30000 | tr -d '\\n' >/run/long; [ $(wc -c </run/long) = 168893 ]")?;
    guest.check("timeout 100 wget -q -O - http://169.254.169.254/long | cmp - /run/long")?;
    guest.check(
        "for i in 0 1 2 3 4 5 6 7 8 9; do timeout 100 wget -q -O /run/long.$i http://169.254.169.254/long & done; wait
         for i in 0 1 2 3 4 5 6 7 8 9; do cmp /run/long.$i /run/long || exit 1; done",
    )?;
    Ok(())
}

/// Requests on one connection, the second one in two pieces.
fn assert_connections_are_kept(guest: &Guest) -> Result {
    let answers = guest.check(
        "{ printf 'GET /latest/meta-data/ami-id HTTP/1.1\\r\\n\\r\\nGET /lat'; sleep 1
           printf 'est/user-data HTTP/1.1\\r\\nConnection: close\\r\\n\\r\\n'; sleep 1; } | nc 169.254.169.254 80",
    )?;
    assert_eq!(answers.matches("HTTP/1.1 200 ").count(), 2, "{answers}");
    assert!(
        answers.contains("ami-1") && answers.ends_with("#!/bin/sh"),
        "{answers}"
    );
    Ok(())
}

#[test]
fn v1_is_read_with_wget_beside_other_traffic() -> Result {
    let service = json!({"network_interfaces": ["net0"]});
    let machine = boot("mmds-v1", Subnet(30), service, |vm| vm.vcpus(2))?;
    let (vm, guest, host) = (&machine.vm, machine.vm.guest(), machine.subnet.host().to_string());
    guest.check("ip route add 169.254.169.254 dev eth0")?;
    assert_documents_are_read(&guest)?;
    assert_long_values_come_whole(&guest)?;
    assert_connections_are_kept(&guest)?;

    // Who has no route for it reaches it through the default gateway, and the gateway too.
    guest.check(&format!(
        "ip route del 169.254.169.254; ip route add default via {host}; ip neigh flush dev eth0"
    ))?;
    assert_eq!(get(&guest, "/latest/meta-data/ami-id", "")?, "ami-1");
    guest.check(&format!("ping -c 2 -W 10 {host}"))?;

    vm.patch("/mmds", &json!({"latest": {"meta-data": {"ami-id": "ami-2"}}}))?
        .success()?;
    assert_eq!(get(&guest, "/latest/meta-data/ami-id", "")?, "ami-2");

    let refused = guest.run("nc -w 10 169.254.169.254 81 </dev/null")?;
    assert_ne!(refused.code, 0, "{refused:?}");
    let counted = |name| vm.counted("mmds", name);
    assert!(counted("connections_created")? >= 20);
    assert_eq!((counted("rx_accepted_err")?, counted("tx_errors")?), (0, 0));
    assert!(counted("tx_bytes")? > 11 * 168_893);
    Ok(())
}

/// The body of the answer to a request with these lines.
fn ask(guest: &Guest, lines: &str) -> Result<(String, String)> {
    let answer = guest.check(&format!(
        "printf '{lines}\\r\\nConnection: close\\r\\n\\r\\n' | nc -w 20 169.254.42.1 80"
    ))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    let status = head.split(' ').nth(1).unwrap_or_default();
    Ok((status.to_owned(), body.to_owned()))
}

#[test]
fn v2_is_read_with_tokens_through_its_card_only() -> Result {
    let service = json!({"network_interfaces": ["net0"], "version": "V2", "ipv4_address": "169.254.42.1"});
    let other = Subnet(32).tap()?;
    let machine = boot("mmds-v2", Subnet(31), service, |vm| {
        vm.mmio().net(Net::new("net1", &other))
    })?;
    let guest = machine.vm.guest();
    guest.check("ip route add 169.254.42.1 dev eth0")?;
    let path = "GET /latest/meta-data/ami-id HTTP/1.1";

    assert_eq!(ask(&guest, path)?.0, "401");
    for (ttl, header) in [
        ("X-metadata-token-ttl-seconds", "X-metadata-token"),
        ("X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"),
    ] {
        let (status, token) = ask(
            &guest,
            &format!("PUT /latest/api/token HTTP/1.1\\r\\n{ttl}: 21600"),
        )?;
        assert_eq!((status.as_str(), token.len()), ("200", 32), "{token}");
        let (_, id) = ask(&guest, &format!("{path}\\r\\n{header}: {token}"))?;
        assert_eq!(id, "ami-1");
    }
    let wrong = ask(
        &guest,
        &format!("{path}\\r\\nX-metadata-token: {}", "0".repeat(32)),
    )?;
    assert_eq!(wrong, ("401".into(), "MMDS token not valid.".into()));
    assert_eq!(machine.vm.counted("mmds", "rx_no_token")?, 1);
    assert_eq!(machine.vm.counted("mmds", "rx_invalid_token")?, 1);

    // The second card leads to its tap, where nobody has the address.
    let frames = machine.vm.counted("mmds", "rx_accepted")?;
    guest.check(
        "ip addr add 10.77.32.2/24 dev eth1; ip link set eth1 up
         ip route del 169.254.42.1; ip route add 169.254.42.1 dev eth1",
    )?;
    let lost = guest.run("printf 'GET / HTTP/1.1\\r\\n\\r\\n' | nc -w 5 169.254.42.1 80")?;
    assert_ne!(lost.code, 0, "{lost:?}");
    assert_eq!(machine.vm.counted("mmds", "rx_accepted")?, frames);
    guest.check("ping -c 2 -W 10 10.77.32.1")?;
    Ok(())
}
