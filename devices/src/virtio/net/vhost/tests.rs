//! What needs no vhost-net of the host. The rest is tested with a guest.

use vm_memory::GuestAddress;

use super::super::OpenError;
use super::kernel::regions;
use crate::GuestMemory;

#[test]
fn tells_of_every_region_of_memory() {
    let ranges = [(GuestAddress(0), 0x2000), (GuestAddress(1 << 32), 0x1000)];
    let mem = GuestMemory::from_ranges(&ranges).unwrap();
    let told = regions(&mem);
    let places: Vec<_> = told
        .iter()
        .map(|region| (region.guest_phys_addr, region.memory_size))
        .collect();
    assert_eq!(places, [(0, 0x2000), (1 << 32, 0x1000)]);
    for (region, (start, _)) in told.iter().zip(ranges) {
        let host = vm_memory::GuestMemoryBackend::get_host_address(&mem, start).unwrap();
        assert_eq!(region.userspace_addr, host as u64);
    }
}

#[test]
fn names_what_to_do_where_there_is_no_vhost_net() {
    let missing = std::io::Error::from_raw_os_error(libc::ENOENT);
    let error = OpenError::Vhost {
        source: vhost::Error::VhostOpen(missing),
    };
    let text = error.to_string();
    assert!(
        text.contains("'modprobe vhost_net'") && text.contains("set vhost false"),
        "{text}"
    );
}
