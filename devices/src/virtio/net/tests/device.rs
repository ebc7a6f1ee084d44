use super::super::feature;
use super::*;
use crate::virtio::feature::COMMON;

fn net(rest: &str) -> Net<FakeTap> {
    Net::new(&config(rest), FakeTap::new().0)
}

/// What `set_offloads` was called with on activations with `features`, and whether an old frame survived them.
fn activated(features: &[u64]) -> (Vec<u64>, bool) {
    let mem = ram();
    let (tap, wire) = FakeTap::new();
    let set = Arc::clone(&tap.set);
    let mut net = Net::new(&config(""), tap);
    wire.send(&frame(100, 1)).unwrap();
    for features in features {
        let recorder = testing::recorder();
        net.activate(&mut testing::io(&mem, &mut [], &recorder, *features))
            .unwrap();
    }
    let survived = net.backend.socket.recv(&mut [0; 100]).is_ok();
    (set.lock().unwrap().clone(), survived)
}

#[test]
fn offers_address_and_mtu_only_when_configured() {
    let always = COMMON | MRG_RXBUF | feature::STATUS | GUEST_CSUM | GUEST_TSO4;
    assert_eq!(net("").info().features, always);
    let both = net(r#","guest_mac":"02:00:00:00:00:01","mtu":1400"#);
    assert_eq!(both.info().features, always | feature::MAC | feature::MTU);
}

#[test]
fn lays_out_address_status_and_mtu() {
    let device = net(r#","guest_mac":"02:00:00:00:00:01","mtu":1400"#);
    assert_eq!(device.config_space(), [2, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0x78, 5]);
}

#[test]
fn leaves_the_tap_alone_when_the_driver_takes_everything() {
    let (set, survived) = activated(&[GUEST_CSUM | GUEST_TSO4 | MRG_RXBUF]);
    assert_eq!((set, survived), (vec![], true));
}

#[test]
fn throws_frames_away_that_the_driver_might_not_take() {
    let (set, survived) = activated(&[GUEST_CSUM | MRG_RXBUF]);
    assert_eq!((set, survived), (vec![GUEST_CSUM], false));
}

#[test]
fn turns_offloads_on_again_for_another_driver() {
    let (set, _) = activated(&[0, GUEST_CSUM]);
    assert_eq!(set, [0, GUEST_CSUM]);
}

#[test]
fn watches_the_tap_from_activation_on() {
    let mem = ram();
    let guest = Guest::new(&mem, 8);
    assert_eq!(guest.recorder.watched.lock().unwrap().len(), 1);
}

#[test]
fn takes_a_patch_that_changes_nothing_and_refuses_other_fields() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    assert!(guest.update(r#"{"iface_id":"eth0"}"#).is_ok());
    assert!(guest.update(r#"{"iface_id":"eth0","mtu":1400}"#).is_err());
}

#[test]
fn loads_what_it_saved_and_nothing_else() {
    let saved = net("").save();
    assert!(net("").load(saved).is_ok());
    let foreign = crate::virtio::Blob::new("block", 1, &[0; 0]);
    assert!(net("").load(foreign).is_err());
}

#[test]
fn names_its_counters_as_clients_expect() {
    let metrics = net("").metrics();
    assert_eq!(metrics.as_object().unwrap().len(), 26);
    assert_eq!(metrics["tap_write_agg"]["sum_us"], 0);
    assert_eq!(crate::catalog::blank_metrics(DeviceKind::Net), metrics);
}

#[test]
fn times_runs_that_moved_frames_and_no_others() {
    let mem = ram();
    let mut guest = Guest::new(&mem, 8);
    guest.offer_rx(0, 2, 1536);
    guest.kick_tx();
    guest.tap_event();
    guest.wire.send(&frame(100, 1)).unwrap();
    guest.wire.send(&frame(100, 2)).unwrap();
    guest.tap_event();
    guest.tx.offer(&[crate::testing::readable(BUFFERS, 100)]);
    guest.kick_tx();
    let counts: Vec<_> = guest
        .net
        .histograms()
        .iter()
        .map(|(name, spread)| (*name, spread.count()))
        .collect();
    assert_eq!(counts, [("rx_batch", 1), ("tx_batch", 1)]);
}
