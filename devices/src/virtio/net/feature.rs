//! Feature bits of a network device (virtio 1.2 §5.1.3; USO from virtio 1.3).

/// The device takes frames whose checksum is still to be filled in.
pub const CSUM: u64 = 1 << 0;
/// The driver takes frames whose checksum is still to be filled in.
pub const GUEST_CSUM: u64 = 1 << 1;
/// The configuration space has the MTU.
pub const MTU: u64 = 1 << 3;
/// The configuration space has the Ethernet address.
pub const MAC: u64 = 1 << 5;
/// The driver takes unsegmented TCP over IPv4.
pub const GUEST_TSO4: u64 = 1 << 7;
/// The driver takes unsegmented TCP over IPv6.
pub const GUEST_TSO6: u64 = 1 << 8;
/// The driver takes unsegmented TCP with congestion marks.
pub const GUEST_ECN: u64 = 1 << 9;
/// The driver takes unfragmented UDP.
pub const GUEST_UFO: u64 = 1 << 10;
/// The device takes unsegmented TCP over IPv4.
pub const HOST_TSO4: u64 = 1 << 11;
/// The device takes unsegmented TCP over IPv6.
pub const HOST_TSO6: u64 = 1 << 12;
/// The device takes unsegmented TCP with congestion marks.
pub const HOST_ECN: u64 = 1 << 13;
/// The device takes unfragmented UDP.
pub const HOST_UFO: u64 = 1 << 14;
/// The driver takes a frame in several buffers.
pub const MRG_RXBUF: u64 = 1 << 15;
/// The configuration space has the link's state.
pub const STATUS: u64 = 1 << 16;
/// There is a control queue.
pub const CTRL_VQ: u64 = 1 << 17;
/// There are several pairs of queues, of which the driver says how many it uses.
pub const MQ: u64 = 1 << 22;
/// The driver takes unsegmented UDP over IPv4.
pub const GUEST_USO4: u64 = 1 << 54;
/// The driver takes unsegmented UDP over IPv6.
pub const GUEST_USO6: u64 = 1 << 55;
/// The device takes unsegmented UDP.
pub const HOST_USO: u64 = 1 << 56;

/// What decides which frames the driver can take.
pub(super) const GUEST_OFFLOADS: u64 =
    GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO | GUEST_USO4 | GUEST_USO6;
