-- The queue's operations. Redis runs each call as a whole, so that no process sees or leaves half of one.
-- KEYS[1]: the prefix of all keys. ARGV: the operation, the Unix time ('' for the server's own), the operation's arguments.
--
-- job:ID             a hash: the job               keys               result key -> id, of jobs queued, running or done
-- ready:PRIORITY:SITE  queued jobs by (turn, sequence)  age           queued jobs by sequence
-- sites:PRIORITY     sites by their next turn      turns:PRIORITY     SITE/USER -> last turn; SITE/ -> turn claimed last
-- running            jobs by the end of the lease  facts              counters
-- counts             jobs by status                durations          seconds of the jobs that were done last
-- done               jobs whose results are shared, by the order of their ends
-- workers            name -> time and state
local prefix, operation, now = KEYS[1], ARGV[1], ARGV[2]
if now == '' then
  local time = redis.call('TIME')
  now = time[1] .. '.' .. string.format('%06d', time[2])
end
local now_s = tonumber(now)
local RECENT_JOBS = 50

local function call(command, key, ...) return redis.call(command, prefix .. key, ...) end
local function get(id, field) return call('HGET', 'job:' .. id, field) end
local function set(id, ...) return call('HSET', 'job:' .. id, ...) end
local function fact(name) return tonumber(call('HGET', 'facts', name) or 0) end

local function ready(id)
  return 'ready:' .. get(id, 'priority') .. ':' .. get(id, 'site')
end

local function member(id)
  -- Members of equal turns are in the order of their text.
  return string.format('%016d', get(id, 'sequence')) .. ':' .. id
end

local function enqueue(id)
  call('ZADD', ready(id), get(id, 'turn'), member(id))
  call('ZADD', 'age', get(id, 'sequence'), id)
end

local function dequeue(id)
  call('ZREM', ready(id), member(id))
  call('ZREM', 'age', id)
end

local function set_status(id, status)
  local before = get(id, 'status')
  if before then call('HINCRBY', 'counts', before, -1) end
  call('HINCRBY', 'counts', status, 1)
  set(id, 'status', status)
  call('HINCRBY', 'job:' .. id, 'revision', 1)
end

local function forget_key(id)
  local key = get(id, 'result_key')
  if call('HGET', 'keys', key) == id then call('HDEL', 'keys', key) end
  call('ZREM', 'done', id)
end

local function mean_job_s()
  local durations = call('LRANGE', 'durations', 0, -1)
  if #durations == 0 then return '' end
  local sum = 0
  for _, seconds in ipairs(durations) do sum = sum + tonumber(seconds) end
  return tostring(sum / #durations)
end

-- The turn of a user's next job: one after the last one, and not before the turn that is being claimed at the site.
local function next_turn(site, owner, priority)
  local last = tonumber(call('HGET', 'turns:' .. priority, site .. '/' .. owner) or -1)
  local claimed = tonumber(call('HGET', 'turns:' .. priority, site .. '/') or 0)
  local turn = math.max(claimed, last + 1)
  call('HSET', 'turns:' .. priority, site .. '/' .. owner, turn)
  -- A site that had no jobs joins the round of the others.
  local round = math.max(fact('round:' .. priority), tonumber(call('ZSCORE', 'sites:' .. priority, site) or 0))
  call('ZADD', 'sites:' .. priority, round, site)
  return turn
end

-- Queues a job again, in its old place, or quarantines it.
local function try_again(id, max_tries, reason)
  local tries = tonumber(get(id, 'tries'))
  call('ZREM', 'running', id)
  set(id, 'token', '', 'worker', '', 'progress', '0', 'stage', '')
  if max_tries and tries >= max_tries then
    forget_key(id)
    set(id, 'ended_s', now, 'reason', 'tried ' .. tries .. ' times without an end; the last time: ' .. reason)
    set_status(id, 'quarantined')
  else
    set(id, 'reason', reason)
    set_status(id, 'queued')
    enqueue(id)
  end
end

local function requeue_expired(lease_s, max_tries)
  -- No lease is longer than this unless the clock was set back.
  for _, id in ipairs(call('ZRANGEBYSCORE', 'running', '(' .. string.format('%.17g', now_s + lease_s), '+inf')) do
    call('ZADD', 'running', now_s + lease_s, id)
  end
  for _, id in ipairs(call('ZRANGEBYSCORE', 'running', '-inf', '(' .. now)) do
    try_again(id, max_tries, 'the worker died or did not report')
  end
end

-- The first job of the site whose turn it is.
local function first(priority)
  for _, site in ipairs(call('ZRANGE', 'sites:' .. priority, 0, -1)) do
    local jobs = call('ZRANGE', 'ready:' .. priority .. ':' .. site, 0, 0)
    if jobs[1] then return string.sub(jobs[1], 18) end
  end
end

-- The job to be claimed next, and why: it is urgent, it is aged, or it is its turn.
local function next_job(ageing_s)
  local last = call('HGET', 'facts', 'last_claim') or ''
  local oldest = call('ZRANGE', 'age', 0, 0)[1]
  local aged = oldest and tonumber(get(oldest, 'submitted_s')) <= now_s - ageing_s and oldest
  local urgent = first(0)
  if urgent then
    if aged and last == 'urgent' then return aged, 'aged' end
    return urgent, 'urgent'
  end
  if aged and last ~= 'aged' then return aged, 'aged' end
  return first(1), 'turn'
end

-- Sites and users have had their turns.
local function count_turn(id, kind)
  local site, priority, turn = get(id, 'site'), get(id, 'priority'), tonumber(get(id, 'turn'))
  local claimed = tonumber(call('HGET', 'turns:' .. priority, site .. '/') or 0)
  call('HSET', 'turns:' .. priority, site .. '/', math.max(claimed, turn))
  local site_turn = tonumber(call('ZSCORE', 'sites:' .. priority, site) or 0)
  if kind ~= 'aged' then
    site_turn = math.max(site_turn, fact('round:' .. priority))
    call('HSET', 'facts', 'round:' .. priority, site_turn)
  end
  call('ZADD', 'sites:' .. priority, site_turn + 1, site)
end

-- The jobs that would be claimed before a queued one.
local function position(id)
  local priority, site, ahead = get(id, 'priority'), get(id, 'site'), 0
  if priority == '1' then
    for _, other in ipairs(call('ZRANGE', 'sites:0', 0, -1)) do ahead = ahead + call('ZCARD', 'ready:0:' .. other) end
  end
  local rank = call('ZRANK', ready(id), member(id))
  local round = tonumber(call('ZSCORE', 'sites:' .. priority, site)) + rank
  for _, other in ipairs(call('ZRANGE', 'sites:' .. priority, 0, -1)) do
    if other ~= site then
      local rounds = round - tonumber(call('ZSCORE', 'sites:' .. priority, other))
      if other < site then rounds = rounds + 1 end
      ahead = ahead + math.max(0, math.min(rounds, call('ZCARD', 'ready:' .. priority .. ':' .. other)))
    end
  end
  return ahead + rank
end

-- The status of a job whose lease is not this one; nil if it is.
local function lost(id, token)
  local status = get(id, 'status')
  if status == 'running' and get(id, 'token') == token then return nil end
  return status or 'gone'
end

local operations = {}

function operations.submit(id, result_key, owner, site, priority, payload, max_queued)
  local known = call('HGET', 'keys', result_key)
  if known then
    if get(known, 'status') == 'queued' and tonumber(priority) < tonumber(get(known, 'priority')) then
      dequeue(known)
      set(known, 'priority', priority, 'turn', next_turn(get(known, 'site'), get(known, 'owner'), priority))
      call('HINCRBY', 'job:' .. known, 'revision', 1)
      enqueue(known)
    end
    return {'known', known}
  end
  local queued = call('ZCARD', 'age')
  if queued >= tonumber(max_queued) then return {'full', queued, mean_job_s()} end
  set(id, 'id', id, 'result_key', result_key, 'owner', owner, 'site', site, 'priority', priority, 'payload', payload,
    'submitted_s', now, 'tries', '0', 'progress', '0', 'stage', '', 'reason', '', 'token', '', 'worker', '',
    'sequence', call('HINCRBY', 'facts', 'sequence', 1), 'turn', next_turn(site, owner, priority))
  set_status(id, 'queued')
  call('HSET', 'keys', result_key, id)
  enqueue(id)
  return {'new', id}
end

function operations.job(id)
  local values = call('HGETALL', 'job:' .. id)
  if #values > 0 and get(id, 'status') == 'queued' then
    values[#values + 1] = 'position'
    values[#values + 1] = tostring(position(id))
  end
  return values
end

function operations.cancel(id)
  local status = get(id, 'status')
  if status ~= 'queued' and status ~= 'running' then return end
  if status == 'queued' then dequeue(id) else call('ZREM', 'running', id) end
  forget_key(id)
  set(id, 'ended_s', now, 'token', '', 'worker', '')
  set_status(id, 'cancelled')
end

function operations.claim(worker, lease_s, max_tries, ageing_s)
  requeue_expired(tonumber(lease_s), tonumber(max_tries))
  local id, kind = next_job(tonumber(ageing_s))
  if not id then return nil end
  dequeue(id)
  count_turn(id, kind)
  call('HSET', 'facts', 'last_claim', kind)
  local token = call('HINCRBY', 'facts', 'token', 1)
  call('HINCRBY', 'job:' .. id, 'tries', 1)
  set(id, 'token', token, 'worker', worker, 'started_s', now, 'progress', '0', 'stage', '')
  set_status(id, 'running')
  call('ZADD', 'running', now_s + tonumber(lease_s), id)
  return {id, tostring(token), get(id, 'payload')}
end

function operations.renew(id, token, lease_s, progress, stage)
  local status = lost(id, token)
  if status then return status end
  call('ZADD', 'running', now_s + tonumber(lease_s), id)
  if get(id, 'progress') ~= progress or get(id, 'stage') ~= stage then
    set(id, 'progress', progress, 'stage', stage)
    call('HINCRBY', 'job:' .. id, 'revision', 1)
  end
end

function operations.finish(id, token, status, result, reason, max_shared)
  local other = lost(id, token)
  if other then return other end
  call('ZREM', 'running', id)
  set(id, 'ended_s', now, 'reason', reason, 'stage', '', 'token', '', 'worker', '')
  if status == 'done' then
    set(id, 'result', result, 'progress', '1')
    call('LPUSH', 'durations', tostring(now_s - tonumber(get(id, 'started_s'))))
    call('LTRIM', 'durations', 0, RECENT_JOBS - 1)
    call('ZADD', 'done', call('HINCRBY', 'facts', 'ends', 1), id)
    for _, oldest in ipairs(call('ZRANGE', 'done', 0, -1 - tonumber(max_shared))) do forget_key(oldest) end
  else
    forget_key(id)
  end
  set_status(id, status)
end

function operations.abandon(id, token, max_tries, reason)
  local status = lost(id, token)
  if status then return status end
  try_again(id, tonumber(max_tries), reason)
end

function operations.release(id, token)
  local status = lost(id, token)
  if status then return status end
  call('HINCRBY', 'job:' .. id, 'tries', -1)
  try_again(id, nil, '')
end

function operations.worker_died(worker, lease_s, max_tries)
  for _, id in ipairs(call('ZRANGE', 'running', 0, -1)) do
    if get(id, 'worker') == worker then call('ZADD', 'running', 0, id) end
  end
  call('HDEL', 'workers', worker)
  requeue_expired(tonumber(lease_s), tonumber(max_tries))
end

function operations.forget_results()
  for _, id in ipairs(call('ZRANGE', 'done', 0, -1)) do forget_key(id) end
end

function operations.report_worker(worker, state)
  call('HSET', 'workers', worker, now .. ' ' .. state)
end

function operations.workers()
  return {now, call('HGETALL', 'workers')}
end

function operations.stats()
  local oldest = call('ZRANGE', 'age', 0, 0)[1]
  local age_s = oldest and math.max(0, now_s - tonumber(get(oldest, 'submitted_s'))) or 0
  return {call('HGETALL', 'counts'), tostring(age_s), mean_job_s()}
end

return operations[operation](unpack(ARGV, 3))
