// Preloaded into NNI's manager (NODE_OPTIONS="--require=..."): what would listen on all interfaces listens on this machine's only.
// Place: nni_node/rest_server/index.js, `app.listen(this.port)`, in NNI 3.0; the manager has no option for the host.
const net = require("net");

const listen = net.Server.prototype.listen;

net.Server.prototype.listen = function (port, ...rest) {
  const hostless = typeof port === "number" && typeof rest[0] !== "string";
  return hostless ? listen.call(this, port, "localhost", ...rest) : listen.call(this, port, ...rest);
};
