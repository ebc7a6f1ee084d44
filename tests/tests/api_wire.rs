//! The bytes on the API socket, and what the server does with clients that are slow, greedy or confused.

use std::time::Duration;

use mayfly_tests::{Monitor, MonitorBuilder, Result};

fn monitor() -> Result<Monitor> {
    MonitorBuilder::new("wire")?.start()
}

#[test]
fn answers_have_no_reason_phrase_and_a_fixed_order_of_headers() -> Result {
    let monitor = monitor()?;
    let ok = monitor.get("/machine-config")?;
    let length = ok.body.len();
    assert_eq!(
        ok.head,
        format!(
            "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        )
    );
    let done = monitor.request("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128}"#)?;
    assert_eq!(
        done.head,
        "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
    );
    let refused = monitor.get("/nope")?;
    assert!(
        refused
            .head
            .starts_with("HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n")
    );
    Ok(())
}

#[test]
fn a_deprecated_field_is_announced_between_connection_and_type() -> Result {
    let body = r#"{"vcpu_count":1,"mem_size_mib":128,"cpu_template":"None"}"#;
    let done = monitor()?.request("PUT", "/machine-config", body)?;
    let expected =
        "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nDeprecation: true\r\n\r\n";
    assert_eq!(done.head, expected);
    Ok(())
}

#[test]
fn pipelined_requests_are_answered_in_order() -> Result {
    let (_monitor, mut client) = monitor_and_client()?;
    client.send(b"GET /version HTTP/1.1\r\n\r\nGET /nope HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n")?;
    assert!(client.receive()?.body.contains("firecracker_version"));
    assert_eq!(client.receive()?.status, 400);
    assert!(client.receive()?.body.contains("app_name"));
    Ok(())
}

fn monitor_and_client() -> Result<(Monitor, mayfly_tests::Client)> {
    let monitor = monitor()?;
    let client = monitor.connect()?;
    Ok((monitor, client))
}

#[test]
fn a_request_byte_by_byte_is_answered() -> Result {
    let (_monitor, mut client) = monitor_and_client()?;
    for byte in b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n" {
        client.send(&[*byte])?;
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(client.receive()?.status, 200);
    Ok(())
}

#[test]
fn expect_100_continue_is_answered_before_the_body_comes() -> Result {
    let (_monitor, mut client) = monitor_and_client()?;
    let body = r#"{"vcpu_count":1,"mem_size_mib":128}"#;
    let length = body.len();
    let head =
        format!("PUT /machine-config HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n");
    client.send(head.as_bytes())?;
    let interim = client.receive()?;
    assert_eq!(
        interim.head,
        "HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
    );
    client.send(body.as_bytes())?;
    assert_eq!(client.receive()?.status, 204);
    Ok(())
}

#[test]
fn connection_close_is_honoured() -> Result {
    let (_monitor, mut client) = monitor_and_client()?;
    client.send(b"GET /version HTTP/1.1\r\nConnection: close\r\n\r\n")?;
    assert_eq!(client.receive()?.status, 200);
    assert!(client.is_closed()?);
    Ok(())
}

#[test]
fn what_is_no_http_gets_a_fault_in_json() -> Result {
    let monitor = monitor()?;
    for request in [
        "POST / HTTP/1.1\r\n\r\n",
        "GET / HTTP/2.0\r\n\r\n",
        "garbage\r\n\r\n",
        "PUT / HTTP/1.1\r\nContent-Length: abc\r\n\r\n",
        "PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ] {
        let mut client = monitor.connect()?;
        client.send(request.as_bytes())?;
        let answer = client.receive()?;
        assert_eq!(answer.status, 400, "{request:?}");
        assert!(!answer.fault()?.is_empty(), "{request:?}");
    }
    Ok(())
}

#[test]
fn a_body_may_have_the_default_limit_and_not_a_byte_more() -> Result {
    let monitor = monitor()?;
    let padded = |length: usize| format!("{:length$}", r#"{"vcpu_count":1,"mem_size_mib":128}"#);
    assert_eq!(
        monitor.request("PUT", "/machine-config", &padded(51_200))?.status,
        204
    );
    let refused = monitor
        .connect()?
        .request("PUT", "/machine-config", &padded(51_201))?;
    assert_eq!(refused.status, 400);
    assert!(refused.fault()?.contains("51200"), "{refused:?}");
    Ok(())
}

#[test]
fn the_limit_of_bodies_can_be_set() -> Result {
    let monitor = MonitorBuilder::new("limit")?
        .args(["--http-api-max-payload-size=40"])
        .start()?;
    let body = r#"{"vcpu_count":1,"mem_size_mib":128}"#;
    assert_eq!(monitor.request("PUT", "/machine-config", body)?.status, 204);
    let longer = monitor
        .connect()?
        .request("PUT", "/machine-config", &format!("{body:41}"))?;
    assert_eq!(longer.status, 400);
    Ok(())
}

#[test]
fn the_eleventh_connection_is_turned_away_while_the_others_are_busy() -> Result {
    let monitor = monitor()?;
    let mut clients = Vec::new();
    for _ in 0..10 {
        let mut client = monitor.connect()?;
        client.send(b"GET /version HTTP/1.1\r\n")?;
        clients.push(client);
    }
    let refused = monitor.connect()?.receive()?;
    assert_eq!(refused.status, 503);
    assert!(refused.body.contains("Too many open connections"), "{refused:?}");
    clients[0].send(b"\r\n")?;
    assert_eq!(clients[0].receive()?.status, 200);
    Ok(())
}

#[test]
fn ten_idle_connections_do_not_keep_an_eleventh_out() -> Result {
    let monitor = monitor()?;
    let mut clients = Vec::new();
    for _ in 0..10 {
        let mut client = monitor.connect()?;
        assert_eq!(client.request("GET", "/version", "")?.status, 200);
        clients.push(client);
    }
    let mut eleventh = monitor.connect()?;
    assert_eq!(eleventh.request("GET", "/version", "")?.status, 200);
    assert!(clients[0].is_closed()?);
    assert_eq!(clients[1].request("GET", "/version", "")?.status, 200);
    Ok(())
}

#[test]
fn an_idle_monitor_uses_no_processor_time() -> Result {
    let monitor = monitor()?;
    let _idle = monitor.connect()?;
    let mut half = monitor.connect()?;
    half.send(b"PUT /machine-config HTTP/1.1\r\nContent-Length: 10\r\n\r\n")?;
    std::thread::sleep(Duration::from_millis(300));
    let before = cpu_ticks(&monitor)?;
    std::thread::sleep(Duration::from_secs(2));
    let used = cpu_ticks(&monitor)? - before;
    assert!(used <= 1, "{used} ticks in 2 s");
    Ok(())
}

/// Processor time of the process so far, in ticks of 10 ms.
fn cpu_ticks(monitor: &Monitor) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", monitor.pid()))?;
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}
