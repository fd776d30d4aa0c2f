package rig

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
)

// Rate is a link speed in bits per second. Zero is unlimited.
type Rate int64

// Mbit is a million bits per second.
const Mbit Rate = 1_000_000

// Bytes is what the rate carries in a second.
func (r Rate) Bytes() int64 { return int64(r) / 8 }

// NetworkOptions describe a switch with nodes around it.
type NetworkOptions struct {
	Nodes        int  // 1 to 250, not counting the registry's
	Rate         Rate // of every node's link, in each direction
	RegistryRate Rate // of the registry's link, in each direction; zero: as Rate
}

// Network is one bridge in a namespace of its own and, around it, namespaces with an eth0 each: the nodes, 10.77.0.1 and
// on, and the registry's, 10.77.255.250. It carries no route to the world.
type Network struct {
	rig      *Rig
	bridge   string // the bridge's namespace
	nodes    []*Node
	registry *Node
}

// Node is one machine of a network: a network namespace. The file system and the other namespaces are shared.
type Node struct {
	Name    string     // n1, n2, …, registry
	Addr    netip.Addr // of eth0
	network *Network
	netns   string
	port    string // its interface on the bridge

	mu      sync.Mutex // guards following
	blocked map[*Node]bool
}

// Traffic counts what passed a node's link, Ethernet headers and retransmissions included.
type Traffic struct {
	Sent     int64 // bytes
	Received int64 // bytes
}

// tbf's burst holds what one timer tick lets through at these rates; latency bounds the queue to 50 ms, as a small switch's
// buffer would. Measured: 256 KiB shapes 200 Mbit/s to within 4 % on a machine with 250 Hz timers.
const shaping = "burst 256kb latency 50ms"

// NewNetwork makes namespaces and links. The error is ErrNoNamespaces when this cannot be done here.
func (r *Rig) NewNetwork(o NetworkOptions) (*Network, error) {
	if o.Nodes < 1 || o.Nodes > 250 {
		return nil, fmt.Errorf("a network has 1 to 250 nodes, not %d", o.Nodes)
	}
	if os.Geteuid() != 0 {
		return nil, ErrNoNamespaces
	}
	if o.RegistryRate == 0 {
		o.RegistryRate = o.Rate
	}
	w := &Network{rig: r, bridge: r.nextNamespace("sw")}
	if err := r.addNamespace(w.bridge); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoNamespaces, err)
	}
	if err := ip(w.bridge, "link add br0 type bridge", "link set br0 up"); err != nil {
		return nil, err
	}
	for i := 1; i <= o.Nodes; i++ {
		node, err := w.addNode(fmt.Sprintf("n%d", i), netip.AddrFrom4([4]byte{10, 77, 0, byte(i)}), o.Rate)
		if err != nil {
			return nil, err
		}
		w.nodes = append(w.nodes, node)
	}
	node, err := w.addNode("registry", netip.AddrFrom4([4]byte{10, 77, 255, 250}), o.RegistryRate)
	if err != nil {
		return nil, err
	}
	w.registry = node
	return w, nil
}

func (w *Network) addNode(name string, addr netip.Addr, rate Rate) (*Node, error) {
	n := &Node{Name: name, Addr: addr, network: w, netns: w.rig.nextNamespace(name), port: "p-" + name, blocked: map[*Node]bool{}}
	if err := w.rig.addNamespace(n.netns); err != nil {
		return nil, err
	}
	// Both ends are made where they belong: nothing appears, nor can collide, in this process's namespace.
	err := ip("", fmt.Sprintf("link add %s netns %s type veth peer name eth0 netns %s", n.port, w.bridge, n.netns))
	if err != nil {
		return nil, err
	}
	if err := ip(w.bridge, "link set "+n.port+" master br0 up"); err != nil {
		return nil, err
	}
	if err := ip(n.netns, "link set lo up", fmt.Sprintf("addr add %s/16 dev eth0", addr), "link set eth0 up"); err != nil {
		return nil, err
	}
	if err := n.congestion(); err != nil {
		return nil, err
	}
	if rate > 0 {
		if err := n.shape("add", rate); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// congestionControl is TCP's for all nodes: the kernel's default, whatever this machine was set to. A network without distance
// (round trips of 0.02 ms that grow to 50 when the shaped queue fills) is what bbr's model does not fit: with it single flows of a
// node that had room fell to a third for seconds, at random.
const congestionControl = "reno"

func (n *Node) congestion() error {
	command := exec.Command("nsenter", "--net=/run/netns/"+n.netns, "sh", "-c", "printf "+congestionControl+" > /proc/sys/net/ipv4/tcp_congestion_control")
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("set the congestion control of %s: %w: %s", n.Name, err, out)
	}
	return nil
}

// SetRate changes the speed of a shaped link, in both directions, also under traffic.
func (n *Node) SetRate(rate Rate) error { return n.shape("change", rate) }

// shape makes or changes the limits of the node's link. The uplink is shaped where the node sends, the downlink where the
// bridge sends to it.
func (n *Node) shape(verb string, rate Rate) error {
	return errors.Join(
		tc(n.netns, fmt.Sprintf("qdisc %s dev eth0 root tbf rate %dbit %s", verb, rate, shaping)),
		tc(n.network.bridge, fmt.Sprintf("qdisc %s dev %s root tbf rate %dbit %s", verb, n.port, rate, shaping)))
}

// Node is the i-th node, counted from 1.
func (w *Network) Node(i int) *Node { return w.nodes[i-1] }

// Nodes are all but the registry's.
func (w *Network) Nodes() []*Node { return w.nodes }

// Registry is the node meant for the registry.
func (w *Network) Registry() *Node { return w.registry }

// Block drops every packet between two nodes, in both directions, until Unblock.
func (w *Network) Block(a, b *Node) error {
	return errors.Join(a.setBlocked(b, true), b.setBlocked(a, true))
}

// Unblock undoes Block.
func (w *Network) Unblock(a, b *Node) error {
	return errors.Join(a.setBlocked(b, false), b.setBlocked(a, false))
}

// nowhere is a hardware address that nobody has: frames to it get lost without an answer, as on a cut cable. A blackhole route
// or a firewall's reject would fail at once instead.
const nowhere = "02:00:00:00:00:01"

func (n *Node) setBlocked(other *Node, blocked bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.blocked[other] == blocked {
		return nil
	}
	command := fmt.Sprintf("neigh del %s dev eth0", other.Addr)
	if blocked {
		command = fmt.Sprintf("neigh replace %s lladdr %s nud permanent dev eth0", other.Addr, nowhere)
	}
	if err := ip(n.netns, command); err != nil {
		return err
	}
	n.blocked[other] = blocked
	return nil
}

// Traffic reads the counters of the node's link.
func (n *Node) Traffic() (Traffic, error) {
	out, err := exec.Command("ip", "-n", n.netns, "-s", "-j", "link", "show", "eth0").Output()
	if err != nil {
		return Traffic{}, fmt.Errorf("read the byte counters of %s: %w", n.Name, err)
	}
	var links []struct {
		Stats struct {
			RX struct {
				Bytes int64 `json:"bytes"`
			} `json:"rx"`
			TX struct {
				Bytes int64 `json:"bytes"`
			} `json:"tx"`
		} `json:"stats64"`
	}
	if err := json.Unmarshal(out, &links); err != nil || len(links) != 1 {
		return Traffic{}, fmt.Errorf("read the byte counters of %s from %q: %w", n.Name, out, err)
	}
	return Traffic{Sent: links[0].Stats.TX.Bytes, Received: links[0].Stats.RX.Bytes}, nil
}

// nextNamespace is a namespace name of this rig.
func (r *Rig) nextNamespace(name string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.namespaces++
	return fmt.Sprintf("%s%d-%s", namespacePrefix(r.id), r.namespaces, name)
}

func (r *Rig) addNamespace(name string) error {
	if err := ip("", "netns add "+name); err != nil {
		return err
	}
	r.Cleanup(func() error { return ip("", "netns del "+name) })
	return nil
}

// ip runs iproute2 commands in a namespace ("" is this process's own), one after another, in one process.
func ip(netns string, commands ...string) error { return batch("ip", netns, commands) }

func tc(netns string, commands ...string) error { return batch("tc", netns, commands) }

func batch(program, netns string, commands []string) error {
	args := []string{"-batch", "-"}
	if netns != "" {
		args = append([]string{"-n", netns}, args...)
	}
	cmd := exec.Command(program, args...)
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %q in namespace %q: %w: %s", program, commands, netns, err, bytes.TrimSpace(out))
	}
	return nil
}
