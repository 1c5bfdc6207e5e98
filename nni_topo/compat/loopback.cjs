// Preloaded into NNI's manager (NODE_OPTIONS="--require=..."): servers listen on localhost instead of all interfaces, and answer only
// requests whose Host and Origin are localhost. Place: nni_node/rest_server/index.js, `app.listen(this.port)`, in NNI 3.0. Cause: the
// manager has no option for the host and doesn't check the Host header: a web page whose name resolves to 127.0.0.1 (DNS rebinding),
// or that opens a web socket to this machine, could start programs from the user's browser.
const http = require("http");
const net = require("net");

const { listen } = net.Server.prototype;
const guarded = new WeakSet();

net.Server.prototype.listen = function (port, ...rest) {
  const hostless = typeof port === "number" && typeof rest[0] !== "string";
  if (!hostless) return listen.call(this, port, ...rest);
  if (this instanceof http.Server && !guarded.has(this)) guard(this);
  return listen.call(this, port, "localhost", ...rest);
};

function guard(server) {
  guarded.add(server);
  const { emit } = server;

  server.emit = function (event, request, reply, ...rest) {
    const asks = ["request", "upgrade", "checkContinue", "checkExpectation", "connect"].includes(event);
    if (!asks || isHere(request)) return emit.call(this, event, request, reply, ...rest);
    const reason = "NNI's manager answers to localhost alone, see docs/compatibility.md of nni_topo\n";
    if (reply instanceof http.ServerResponse) reply.writeHead(403).end(reason);
    else reply.end("HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\n");
    return true;
  };
}

// Whether a request comes from the manager's own pages, or from a program, which sends no Origin header.
function isHere({ headers }) {
  const { host = "", origin = `http://${host}` } = headers;
  return [`http://${host}`, origin].every((each) => /^https?:\/\/(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?$/i.test(each));
}
